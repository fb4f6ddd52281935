"""What each voxel's own distribution says of z_0: the U-Net then learns only what goes beyond it.

For independent normal voxels z_0 ~ N(m, s^2), z_t has variance V = alpha^2 s^2 + sigma^2, and the best predictions are

    E[v | z_t]   = alpha sigma (1 - s^2) / V (z_t - alpha m) - sigma m,   deviation s / sqrt(V)
    E[eps | z_t] = sigma / V (z_t - alpha m),                             deviation alpha s / sqrt(V)

The network reads (z_t - alpha m) / sqrt(V), and its output counts in those deviations: the preconditioning of EDM
(arXiv 2206.00364, section 5), a voxel at a time. Air, most of a brain's latent, hardly varies; a network that must
learn this holds it for wider than it is for thousands of steps, and codes of inverted scans shrink there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldae.utils.errors import UserError

LEAST = 0.02  # deviation of a voxel, in units of the latents': air varies less, and a network is not that exact


class Predicted(Protocol):
    """What a network predicts; diffusion/process.py has those that there are."""

    def gaussian_prediction(
        self, z_t: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """For z_0 ~ N(mean, variance): the best output, and the target's deviation from it."""
        ...


class Normal(NamedTuple):
    """Of a batch of z_t; each (B, C, X, Y, Z) float32."""

    unit: Tensor  # z_t with mean 0 and variance 1
    expected: Tensor  # what the parameterisation predicts, given this voxel alone
    deviation: Tensor  # of the truth from it


class VoxelPrior(nn.Module):
    """Mean and variance of the training latents, as smooth maps: the latents' grid may have any size.

    Args:
        channels: of the latents.
        nodes: of the maps, an axis.
        timesteps: T of the schedule.
        parameterisation: what the network predicts.
    """

    def __init__(self, channels: int, nodes: int, timesteps: int, parameterisation: Predicted) -> None:
        super().__init__()
        self.parameterisation = parameterisation
        self.register_buffer("mean", torch.zeros(1, channels, nodes, nodes, nodes))
        self.register_buffer("variance", torch.ones(1, channels, nodes, nodes, nodes))
        self.register_buffer("log_alpha_bar", torch.zeros(timesteps + 1))  # entry i belongs to t = i - 1

    @torch.no_grad()
    def fit(self, mean: Tensor, variance: Tensor, schedule: Any) -> None:
        """Set the maps to those of the training latents, (C, X, Y, Z), and the noise levels to a schedule's.

        Raises:
            UserError: another number of timesteps or channels than it was built for.
        """
        if len(self.log_alpha_bar) != schedule.timesteps + 1 or len(mean) != self.variance.shape[1]:
            raise UserError(
                f"model.unet.prior is for {len(self.log_alpha_bar) - 1} timesteps and {self.variance.shape[1]} "
                f"channels, the schedule has {schedule.timesteps} and the latents {len(mean)}"
            )
        size = self.variance.shape[2:]
        self.mean.copy_(_resampled(mean[None].float(), size))
        self.variance.copy_(_resampled(variance[None].float(), size).clamp(min=LEAST**2))
        self.log_alpha_bar.copy_(schedule.log_alpha_bar(torch.arange(-1, schedule.timesteps)))

    def forward(self, z_t: Tensor, t: Tensor) -> Normal:
        """z_t (B, C, X, Y, Z), t (B,), which may be fractional."""
        place = (t.float() + 1).clamp(0, len(self.log_alpha_bar) - 1)
        lower = place.floor().long().clamp(max=len(self.log_alpha_bar) - 2)
        log_a = torch.lerp(self.log_alpha_bar[lower], self.log_alpha_bar[lower + 1], place - lower)
        log_a = log_a.view(-1, 1, 1, 1, 1)
        alpha, sigma = (log_a / 2).exp(), torch.expm1(log_a).abs().sqrt()
        mean, variance = (_resampled(map_, z_t.shape[2:]) for map_ in (self.mean, self.variance))
        expected, deviation = self.parameterisation.gaussian_prediction(z_t, alpha, sigma, mean, variance)
        return Normal((z_t - alpha * mean) / (alpha**2 * variance + sigma**2).sqrt(), expected, deviation)


def _resampled(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="trilinear")
