"""Guidance: how the gradient estimate G(z_t, t, y) shifts the predicted noise, eps + k(t) G.

    Posterior      k = c_t = -sqrt(a_t) (1 - A_{t-1}) / sqrt(1 - A_t)   trained by stage 3 with eps (PDAE, 2212.12990)
    Score          k = -sqrt(1 - A_t)                                   used for sampling by PDAE and released weights
    VelocityShift  k = sqrt(A_t)                                        trained by stage 3 with v: v + G as noise

Posterior and Score agree within 2 % for t above about 100 and differ at small t. Because c_0 = 0, G is never trained at
t = 0, so Score sets it to 0 there as well. Every k(t) is a (B,) float64 tensor; t may be fractional.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldae.diffusion.schedule import Schedule

# Predicted noise: z_t (B, C, X, Y, Z) and t (B,) to eps of the shape of z_t. Samplers see networks only as this.
EpsFn = Callable[[Tensor, Tensor], Tensor]


class GuidanceForm(Protocol):
    """One choice of k(t)."""

    def coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """k(t), (B,) float64."""
        ...


@dataclass(frozen=True)
class Posterior:
    """k = c_t: the shift of the posterior mean of z_{t-1} that stage 3 trains, expressed as a shift of eps."""

    def coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """c_t = -sqrt(a_t) (1 - A_{t-1}) / sqrt(1 - A_t) with a_t = A_t / A_{t-1}; 0 for t <= 0."""
        previous = schedule.log_alpha_bar(torch.as_tensor(t) - 1)
        current = schedule.log_alpha_bar(t)
        value = torch.exp((current - previous) / 2) * torch.expm1(previous) / (-torch.expm1(current)).sqrt()
        return torch.where(torch.as_tensor(t) > 0, value, torch.zeros_like(value))


@dataclass(frozen=True)
class Score:
    """k = -sqrt(1 - A_t): G is read as the gradient of log p(y | z_t)."""

    def coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """-sqrt(1 - A_t); 0 for t <= 0, where G is not trained."""
        value = -schedule.sigma(t)
        return torch.where(torch.as_tensor(t) > 0, value, torch.zeros_like(value))


@dataclass(frozen=True)
class VelocityShift:
    """k = sqrt(A_t): the velocity v + G converted to noise."""

    def coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """sqrt(A_t)."""
        return schedule.alpha(t)


@dataclass(frozen=True)
class Guidance:
    """Guidance settings of a sampler.

    Args:
        form: choice of k(t); None uses the form that the parameterisation was trained with (its `trained_form`).
        strength: factor on k(t) G; 1 as trained, 0 unconditional.
        stop: share of the schedule, at its noise-free end, without guidance: G is not added where t < stop * T.
    """

    form: GuidanceForm | None = None
    strength: float = 1.0
    stop: float = 0.0


class GuidedEps:
    """The eps_fn conditioned on y: eps + strength k(t) G, and eps alone where t < stop * T.

    A sampler knows the timestep of a node as a Python number and evaluates `at(time)` there.
    Whether G is needed is thus decided on the host, without reading t back from the device.

    Args:
        eps_fn: unconditional eps of z_t (B, ...) and t (B,).
        eps_and_gradient: (eps, G) of z_t and t, from one pass through the network layers that the two share.
        form: choice of k(t).
        strength, stop: see `Guidance`.
    """

    def __init__(
        self,
        eps_fn: EpsFn,
        eps_and_gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        form: GuidanceForm,
        schedule: Schedule,
        strength: float = 1.0,
        stop: float = 0.0,
    ) -> None:
        self.eps_fn, self.eps_and_gradient = eps_fn, eps_and_gradient
        self.form, self.schedule = form, schedule
        self.strength, self.threshold = strength, stop * schedule.timesteps

    def at(self, time: float) -> EpsFn:
        """The function to evaluate when every sample of the batch is at t = `time`."""
        return self.eps_fn if self.strength == 0 or time < self.threshold else self

    def __call__(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Guided eps of z_t (B, ...) at t (B,), which may differ between samples."""
        eps, gradient = self.eps_and_gradient(z_t, t)
        k = self.strength * self.form.coefficient(self.schedule, t)  # (B,)
        k = torch.where(t < self.threshold, torch.zeros_like(k), k)
        return eps + k.to(eps.dtype).view(-1, *[1] * (eps.ndim - 1)) * gradient
