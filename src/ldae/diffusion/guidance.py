"""How the gradient estimate G(z_t, t, y) shifts the predicted noise: eps + k(t) G, each form beside its equation.

    Posterior      k = c_t = -sqrt(a_t) (1 - A_{t-1}) / sqrt(1 - A_t)   what stage 3 trains with eps (PDAE, 2212.12990)
    Score          k = -sqrt(1 - A_t)                                   PDAE's and the released code's sampling
    VelocityShift  k = sqrt(A_t)                                        what stage 3 trains with v: (v + G) as noise

Posterior and Score agree within 2 % from t ~ 100 on and part at the start, where c_0 = 0: G is never trained there, so
Score drops it too. All forms are (B,) float64 in t, which may be fractional.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldae.diffusion.schedule import Schedule

EpsFn = Callable[[Tensor, Tensor], Tensor]


class GuidanceForm(Protocol):
    """One way to add G to eps."""

    def coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """k(t), (B,) float64."""
        ...


@dataclass(frozen=True)
class Posterior:
    """k = c_t: the shift of the posterior mean that stage 3 trains, written as a shift of eps."""

    def coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """c_t = -sqrt(a_t) (1 - A_{t-1}) / sqrt(1 - A_t), with a_t = A_t / A_{t-1}; 0 for t <= 0."""
        previous = schedule.log_alpha_bar(torch.as_tensor(t) - 1)
        current = schedule.log_alpha_bar(t)
        value = torch.exp((current - previous) / 2) * torch.expm1(previous) / (-torch.expm1(current)).sqrt()
        return torch.where(torch.as_tensor(t) > 0, value, torch.zeros_like(value))


@dataclass(frozen=True)
class Score:
    """k = -sqrt(1 - A_t): G as the gradient of log p(y | z_t)."""

    def coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """-sqrt(1 - A_t); 0 for t <= 0, where G is not trained."""
        value = -schedule.sigma(t)
        return torch.where(torch.as_tensor(t) > 0, value, torch.zeros_like(value))


@dataclass(frozen=True)
class VelocityShift:
    """k = sqrt(A_t): a velocity v + G converted to noise."""

    def coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """sqrt(A_t)."""
        return schedule.alpha(t)


@dataclass(frozen=True)
class Guidance:
    """Guidance as a sampler's setting.

    Args:
        form: how G shifts eps; None: as the parameterisation trained it (its `natural_form`).
        strength: factor on k(t) G.
        stop: share of the schedule, at its noise-free end, where guidance is dropped: t < stop * T.
    """

    form: GuidanceForm | None = None
    strength: float = 1.0
    stop: float = 0.0


def stop_share(times: Sequence[float], share: float, timesteps: int) -> float:
    """The `stop` that drops guidance at the last `share` of a path's evaluations, whatever its grid.

    Args:
        times: t of the path's evaluations, any order.
        share: in [0, 1].
        timesteps: T.
    """
    ascending = np.sort(np.asarray(times, dtype=float))
    dropped = round(share * len(ascending))
    if dropped == 0:
        return 0.0
    upper = ascending[dropped] if dropped < len(ascending) else timesteps
    return float(ascending[dropped - 1] + upper) / 2 / timesteps


class GuidedEps:
    """eps_fn conditioned on y: eps + strength k(t) G; below t = stop * T, G is dropped.

    A sampler knows the time of a node on the host and asks for what to evaluate there (`at`), so that nobody has to
    read t back from the device to know whether G is needed.

    Args:
        eps_fn: unconditional, (z_t (B, ...), t (B,)) -> (B, ...).
        both_fn: eps and G of (z_t, t), where the two share work.
    """

    def __init__(
        self,
        eps_fn: EpsFn,
        both_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        form: GuidanceForm,
        schedule: Schedule,
        strength: float = 1.0,
        stop: float = 0.0,
    ) -> None:
        self.eps_fn, self.both_fn = eps_fn, both_fn
        self.form, self.schedule = form, schedule
        self.strength, self.threshold = strength, stop * schedule.timesteps

    def at(self, time: float) -> EpsFn:
        """What to evaluate where all samples are at t = `time`."""
        return self.eps_fn if self.strength == 0 or time < self.threshold else self

    def __call__(self, z_t: Tensor, t: Tensor) -> Tensor:
        """eps of z_t (B, ...) at t (B,), which may differ between samples."""
        eps, gradient = self.both_fn(z_t, t)
        k = self.strength * self.form.coefficient(self.schedule, t)
        k = torch.where(t < self.threshold, torch.zeros_like(k), k)
        return eps + k.to(eps.dtype).view(-1, *[1] * (eps.ndim - 1)) * gradient
