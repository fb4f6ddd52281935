"""The voxel prior: what the distribution of each latent voxel alone predicts, so that the U-Net learns only the rest.

For independent Gaussian voxels z_0 ~ N(m, s^2), z_t has the variance V = alpha^2 s^2 + sigma^2. The mean and standard
deviation of the targets given z_t are

    E[v | z_t]   = alpha sigma (1 - s^2) / V (z_t - alpha m) - sigma m,   std s / sqrt(V)
    E[eps | z_t] = sigma / V (z_t - alpha m),                             std alpha s / sqrt(V)

The network reads (z_t - alpha m) / sqrt(V), and its output is multiplied by the standard deviation and added to the
mean: the preconditioning of EDM (arXiv 2206.00364, section 5) for each voxel. Most of a brain's latent is air, which
hardly varies. A network that has to learn this overestimates the variance of air for thousands of steps, and the codes
of inverted scans are too narrow there.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldae.utils.errors import UserError

# Smallest standard deviation of a voxel, in units of the latents' own. Air varies less than a network can be exact.
SMALLEST_STD = 0.02


class GaussianPrediction(Protocol):
    """The part of a parameterisation (diffusion/process.py) that the prior needs."""

    def gaussian_prediction(
        self, z_t: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor, variance: Tensor
    ) -> tuple[Tensor, Tensor]:
        """If z_0 ~ N(mean, variance): mean and standard deviation of the target given z_t, each of the shape of z_t."""
        ...


class NoiseSchedule(Protocol):
    """The part of a noise schedule (diffusion/schedule.py) that the prior needs."""

    timesteps: int

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """log A_t of t (B,), with A_{-1} = 1."""
        ...


class PriorPrediction(NamedTuple):
    """What the prior says of a batch of z_t, each (B, C, X, Y, Z) float32."""

    standardised: Tensor  # z_t minus its mean, divided by its standard deviation
    mean: Tensor  # of the target given z_t
    std: Tensor  # of the target given z_t


class VoxelPrior(nn.Module):
    """Mean and variance of the training latents at every voxel, as smooth maps that are resampled to any latent size.

    Args:
        channels: number of channels of the latents.
        grid_size: number of points of the maps along each axis.
        timesteps: T of the noise schedule.
        parameterisation: the quantity that the network predicts.
    """

    def __init__(self, channels: int, grid_size: int, timesteps: int, parameterisation: GaussianPrediction) -> None:
        super().__init__()
        self.parameterisation = parameterisation
        grid = (grid_size, grid_size, grid_size)
        self.register_buffer("mean", torch.zeros(1, channels, *grid))
        self.register_buffer("variance", torch.ones(1, channels, *grid))
        self.register_buffer("log_alpha_bar", torch.zeros(timesteps + 1))  # entry i belongs to t = i - 1

    @torch.no_grad()
    def fit(self, mean: Tensor, variance: Tensor, schedule: NoiseSchedule) -> None:
        """Set the maps and the noise levels, before training.

        Args:
            mean, variance: of the training latents, (C, X, Y, Z) each.
            schedule: noise schedule of the training.

        Raises:
            UserError: the prior was built for another number of timesteps or channels.
        """
        if len(self.log_alpha_bar) != schedule.timesteps + 1 or len(mean) != self.variance.shape[1]:
            raise UserError(
                f"model.unet.prior is for {len(self.log_alpha_bar) - 1} timesteps and {self.variance.shape[1]} "
                f"channels, the schedule has {schedule.timesteps} and the latents {len(mean)}"
            )
        size = self.variance.shape[2:]
        self.mean.copy_(_resample(mean[None].float(), size))
        self.variance.copy_(_resample(variance[None].float(), size).clamp(min=SMALLEST_STD**2))
        self.log_alpha_bar.copy_(schedule.log_alpha_bar(torch.arange(-1, schedule.timesteps)))

    def forward(self, z_t: Tensor, t: Tensor) -> PriorPrediction:
        """z_t (B, C, X, Y, Z) and t (B,), which may be fractional."""
        position = (t.float() + 1).clamp(0, len(self.log_alpha_bar) - 1)
        lower = position.floor().long().clamp(max=len(self.log_alpha_bar) - 2)
        log_a = torch.lerp(self.log_alpha_bar[lower], self.log_alpha_bar[lower + 1], position - lower)
        log_a = log_a.view(-1, 1, 1, 1, 1)
        alpha, sigma = (log_a / 2).exp(), torch.expm1(log_a).abs().sqrt()
        mean, variance = (_resample(map_, z_t.shape[2:]) for map_ in (self.mean, self.variance))
        standardised = (z_t - alpha * mean) / (alpha**2 * variance + sigma**2).sqrt()
        return PriorPrediction(
            standardised, *self.parameterisation.gaussian_prediction(z_t, alpha, sigma, mean, variance)
        )


def _resample(maps: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="trilinear")
