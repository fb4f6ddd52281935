"""The forward process z_t = sqrt(A_t) z_0 + sqrt(1 - A_t) eps, and what a network may predict of it.

With alpha = sqrt(A_t), sigma = sqrt(1 - A_t), any of z_0, eps, v = alpha eps - sigma z_0 (arXiv 2202.00512) gives the
others once z_t is known. Conversions take (schedule, value, z_t, t); coefficients are float64, results like the value.
"""

from typing import Protocol

import torch
from torch import Tensor

from ldae.diffusion.guidance import GuidanceForm, Posterior, VelocityShift
from ldae.diffusion.schedule import Schedule


def _like(coefficient: Tensor, value: Tensor) -> Tensor:
    """A (B,) coefficient shaped and typed to multiply `value` (B, ...)."""
    return coefficient.to(value.device, value.dtype).view(-1, *[1] * (value.ndim - 1))


def _scales(schedule: Schedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    return _like(schedule.alpha(t), like), _like(schedule.sigma(t), like)


def add_noise(schedule: Schedule, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t, (B, ...), from z0 and noise of that shape and t (B,)."""
    alpha, sigma = _scales(schedule, t, z0)
    return alpha * z0 + sigma * noise


def eps_to_z0(schedule: Schedule, eps: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """z_0 = (z_t - sigma eps) / alpha."""
    alpha, sigma = _scales(schedule, t, eps)
    return (z_t - sigma * eps) / alpha


def z0_to_eps(schedule: Schedule, z0: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """eps = (z_t - alpha z_0) / sigma; undefined at t = -1, where z_t holds no noise."""
    alpha, sigma = _scales(schedule, t, z0)
    return (z_t - alpha * z0) / sigma


def eps_to_v(schedule: Schedule, eps: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """v = (eps - sigma z_t) / alpha."""
    alpha, sigma = _scales(schedule, t, eps)
    return (eps - sigma * z_t) / alpha


def v_to_eps(schedule: Schedule, v: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """eps = alpha v + sigma z_t."""
    alpha, sigma = _scales(schedule, t, v)
    return alpha * v + sigma * z_t


def z0_to_v(schedule: Schedule, z0: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """v = (alpha z_t - z_0) / sigma; undefined at t = -1."""
    alpha, sigma = _scales(schedule, t, z0)
    return (alpha * z_t - z0) / sigma


def v_to_z0(schedule: Schedule, v: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """z_0 = alpha z_t - sigma v."""
    alpha, sigma = _scales(schedule, t, v)
    return alpha * z_t - sigma * v


def loss_weight(schedule: Schedule, t: Tensor, power: float = 0.1) -> Tensor:
    """w_t = SNR_t^power / (1 + SNR_t), (B,) float64 (PDAE, arXiv 2212.12990, equation 17)."""
    log_alpha_bar = schedule.log_alpha_bar(t)
    return schedule.snr(t) ** power * -torch.expm1(log_alpha_bar)  # 1 / (1 + SNR) = 1 - A


class Parameterisation(Protocol):
    """What a network predicts, and how stage 3 adds G to it."""

    @property
    def natural_form(self) -> GuidanceForm:
        """The guidance form that equals what stage 3 trained."""
        ...

    def target(self, schedule: Schedule, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to output, like z0."""
        ...

    def to_eps(self, schedule: Schedule, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The network's output as noise."""
        ...

    def to_z0(self, schedule: Schedule, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The network's output as latent."""
        ...

    def of_normal(
        self, z_t: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For z_0 ~ N(mean, variance): the best output, and the target's deviation from it."""
        ...

    def gap_coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """(B,) factor of G where stage 3 adds it to the output."""
        ...

    def gap_weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """(B,) weight of stage 3's squared error."""
        ...


class Epsilon:
    """The network predicts eps; stage 3: w_t |eps - (eps_theta + c_t G)|^2 (published)."""

    natural_form: GuidanceForm = Posterior()

    def target(self, schedule: Schedule, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """eps."""
        return noise

    def to_eps(self, schedule: Schedule, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The output itself."""
        return output

    def to_z0(self, schedule: Schedule, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """(z_t - sigma eps) / alpha."""
        return eps_to_z0(schedule, output, z_t, t)

    def of_normal(
        self, z_t: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """sigma / V (z_t - alpha m) and alpha s / sqrt(V), V = alpha^2 s^2 + sigma^2."""
        total = alpha**2 * variance + sigma**2
        return sigma / total * (z_t - alpha * mean), alpha * (variance / total).sqrt()

    def gap_coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """c_t."""
        return self.natural_form.coefficient(schedule, t)

    def gap_weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """w_t."""
        return loss_weight(schedule, t)


class Velocity:
    """The network predicts v; stage 3: |v - (v_theta + G)|^2, unweighted, so that what y adds at high noise counts."""

    natural_form: GuidanceForm = VelocityShift()

    def target(self, schedule: Schedule, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """alpha eps - sigma z_0."""
        alpha, sigma = _scales(schedule, t, z0)
        return alpha * noise - sigma * z0

    def to_eps(self, schedule: Schedule, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """alpha v + sigma z_t."""
        return v_to_eps(schedule, output, z_t, t)

    def to_z0(self, schedule: Schedule, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """alpha z_t - sigma v."""
        return v_to_z0(schedule, output, z_t, t)

    def of_normal(
        self, z_t: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """alpha sigma (1 - s^2) / V (z_t - alpha m) - sigma m and s / sqrt(V), V = alpha^2 s^2 + sigma^2."""
        total = alpha**2 * variance + sigma**2
        factor = alpha * sigma * (1 - variance) / total
        return factor * (z_t - alpha * mean) - sigma * mean, (variance / total).sqrt()

    def gap_coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(schedule.log_alpha_bar(t))

    def gap_weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(schedule.log_alpha_bar(t))
