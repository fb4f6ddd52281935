"""The forward process z_t = sqrt(A_t) z_0 + sqrt(1 - A_t) eps (arXiv 2006.11239), and the quantity a network predicts.

Throughout, alpha = sqrt(A_t) and sigma = sqrt(1 - A_t). Given z_t, each of z_0, eps and v = alpha eps - sigma z_0
(arXiv 2202.00512) determines the other two. The conversions take (schedule, value (B, ...), z_t (B, ...), t (B,));
coefficients are computed in float64, results have the dtype of the value.
"""

from typing import Protocol

import torch
from torch import Tensor

from ldae.diffusion.guidance import GuidanceForm, Posterior, VelocityShift
from ldae.diffusion.schedule import Schedule


def _like(coefficient: Tensor, value: Tensor) -> Tensor:
    """A coefficient (B,), in the dtype of `value` and broadcastable to its shape (B, ...)."""
    return coefficient.to(value.device, value.dtype).view(-1, *[1] * (value.ndim - 1))


def _alpha_sigma(schedule: Schedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(A_t) and sqrt(1 - A_t), broadcastable to `like` (B, ...)."""
    return _like(schedule.alpha(t), like), _like(schedule.sigma(t), like)


def add_noise(schedule: Schedule, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = alpha z_0 + sigma eps, of the shape of z0 and noise (B, ...); t (B,)."""
    alpha, sigma = _alpha_sigma(schedule, t, z0)
    return alpha * z0 + sigma * noise


def eps_to_z0(schedule: Schedule, eps: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """z_0 = (z_t - sigma eps) / alpha."""
    alpha, sigma = _alpha_sigma(schedule, t, eps)
    return (z_t - sigma * eps) / alpha


def z0_to_eps(schedule: Schedule, z0: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """eps = (z_t - alpha z_0) / sigma; undefined at t = -1, where sigma = 0."""
    alpha, sigma = _alpha_sigma(schedule, t, z0)
    return (z_t - alpha * z0) / sigma


def eps_to_v(schedule: Schedule, eps: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """v = (eps - sigma z_t) / alpha."""
    alpha, sigma = _alpha_sigma(schedule, t, eps)
    return (eps - sigma * z_t) / alpha


def v_to_eps(schedule: Schedule, v: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """eps = alpha v + sigma z_t."""
    alpha, sigma = _alpha_sigma(schedule, t, v)
    return alpha * v + sigma * z_t


def z0_to_v(schedule: Schedule, z0: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """v = (alpha z_t - z_0) / sigma; undefined at t = -1, where sigma = 0."""
    alpha, sigma = _alpha_sigma(schedule, t, z0)
    return (alpha * z_t - z0) / sigma


def v_to_z0(schedule: Schedule, v: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
    """z_0 = alpha z_t - sigma v."""
    alpha, sigma = _alpha_sigma(schedule, t, v)
    return alpha * z_t - sigma * v


def loss_weight(schedule: Schedule, t: Tensor, power: float = 0.1) -> Tensor:
    """w_t = SNR_t^power / (1 + SNR_t), (B,) float64 (PDAE, arXiv 2212.12990, equation 17)."""
    log_alpha_bar = schedule.log_alpha_bar(t)
    return schedule.snr(t) ** power * -torch.expm1(log_alpha_bar)  # 1 / (1 + SNR) = 1 - A


class Parameterisation(Protocol):
    """The quantity that the U-Net predicts, and how stage 3 adds the gradient estimate G to it."""

    @property
    def trained_form(self) -> GuidanceForm:
        """The guidance form under which sampling adds G exactly as stage 3 trained it."""
        ...

    def target(self, schedule: Schedule, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The regression target of the network, of the shape of z0."""
        ...

    def to_eps(self, schedule: Schedule, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """eps implied by the network's output."""
        ...

    def gaussian_prediction(
        self, z_t: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """If z_0 ~ N(mean, variance): mean and standard deviation of the target given z_t, each of the shape of z_t."""
        ...

    def gap_coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Factor (B,) on G when stage 3 adds it to the U-Net's output."""
        ...

    def gap_weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """Weight (B,) of the squared error of stage 3."""
        ...


class Epsilon:
    """The network predicts eps; the loss of stage 3 is w_t |eps - (eps_theta + c_t G)|^2. As published."""

    trained_form: GuidanceForm = Posterior()

    def target(self, schedule: Schedule, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """eps."""
        return noise

    def to_eps(self, schedule: Schedule, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The output, unchanged."""
        return output

    def gaussian_prediction(
        self, z_t: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """sigma / V (z_t - alpha m) and alpha s / sqrt(V) with mean m, variance s^2 and V = alpha^2 s^2 + sigma^2."""
        total = alpha**2 * variance + sigma**2
        return sigma / total * (z_t - alpha * mean), alpha * (variance / total).sqrt()

    def gap_coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """c_t."""
        return self.trained_form.coefficient(schedule, t)

    def gap_weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """w_t."""
        return loss_weight(schedule, t)


class Velocity:
    """The network predicts v; the loss of stage 3 is |v - (v_theta + G)|^2, without a weight.

    With eps and w_t, what y can add at high noise hardly changes the loss, and y may be ignored; with v it does change.
    """

    trained_form: GuidanceForm = VelocityShift()

    def target(self, schedule: Schedule, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """alpha eps - sigma z_0."""
        alpha, sigma = _alpha_sigma(schedule, t, z0)
        return alpha * noise - sigma * z0

    def to_eps(self, schedule: Schedule, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """alpha v + sigma z_t."""
        return v_to_eps(schedule, output, z_t, t)

    def gaussian_prediction(
        self, z_t: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """alpha sigma (1 - s^2) / V (z_t - alpha m) - sigma m and s / sqrt(V); m, s^2 and V as in `Epsilon`."""
        total = alpha**2 * variance + sigma**2
        factor = alpha * sigma * (1 - variance) / total
        return factor * (z_t - alpha * mean) - sigma * mean, (variance / total).sqrt()

    def gap_coefficient(self, schedule: Schedule, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(schedule.log_alpha_bar(t))

    def gap_weight(self, schedule: Schedule, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(schedule.log_alpha_bar(t))
