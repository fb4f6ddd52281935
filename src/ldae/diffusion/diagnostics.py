"""Quality of a diffusion autoencoder: its posterior-mean gap, and how close its codes are to Gaussian noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldae.diffusion.guidance import EpsFn
from ldae.diffusion.process import add_noise, eps_to_z0
from ldae.diffusion.schedule import Schedule


@dataclass(frozen=True)
class GapCurve:
    """The posterior-mean gap at K timesteps.

    Attributes:
        timesteps: t, (K,) int64.
        gap: root mean square of mu(z_t, z_0) - mu_theta(z_t), the true and the predicted posterior mean of z_{t-1},
            (K,) float64.
        z0_error: root mean square of the error of the predicted z_0, (K,) float64; gap is a function of t times this.
    """

    timesteps: Tensor
    gap: Tensor
    z0_error: Tensor

    @property
    def rms(self) -> float:
        """Root mean square of the gap over the timesteps."""
        return float(self.gap.square().mean().sqrt())

    def filled_share(self, filled: "GapCurve") -> float:
        """Share of this squared gap that another prediction closes: 1 all of it, 0 none, negative if it is wider.

        Args:
            filled: gap of the other prediction, such as the one guided by y, at the same timesteps.
        """
        return float(1 - filled.gap.square().mean() / self.gap.square().mean())


@torch.no_grad()
def posterior_mean_gap(
    eps_fn: EpsFn, z0: Tensor, schedule: Schedule, timesteps: Sequence[int], noise: Callable[[int], Tensor]
) -> GapCurve:
    """Gap between the true posterior mean and the one that a prediction implies (PDAE, arXiv 2212.12990, section 3).

    The mean of q(z_{t-1} | z_t, z_0) is k z_0 plus a multiple of z_t, with k = sqrt(A_{t-1}) (1 - a_t) / (1 - A_t), so
    the gap is k times the error of the predicted z_0.

    Args:
        eps_fn: the prediction: unconditional for the gap of the U-Net, guided by y for the gap that remains.
        z0: latents, (B, ...).
        timesteps: integers in [0, T-1].
        noise: noise of timestep t, of the shape of z0; use the same for predictions that are compared.
    """
    errors = []
    for step in timesteps:
        t = torch.full((len(z0),), step, device=z0.device)
        z_t = add_noise(schedule, z0, noise(step), t)
        predicted = eps_to_z0(schedule, eps_fn(z_t, t.to(torch.float32)), z_t, t)
        errors.append(float((predicted - z0).double().square().mean().sqrt()))
    t = torch.tensor(list(timesteps))
    z0_error = torch.tensor(errors, dtype=torch.float64)
    previous, current = schedule.log_alpha_bar(t - 1), schedule.log_alpha_bar(t)
    factor = (previous / 2).exp() * torch.expm1(current - previous) / torch.expm1(current)
    return GapCurve(t, factor * z0_error, z0_error)


@dataclass(frozen=True)
class Gaussianity:
    """Summary statistics that tell codes from standard normal noise.

    Attributes:
        mean, std: over all elements; 0 and 1 for noise.
        kurtosis: excess kurtosis over all elements; 0 for noise.
        norm_ratio: mean of |z|^2 divided by its expectation, the number of dimensions; 1 for noise.
        norm_ks: Kolmogorov-Smirnov distance, in [0, 1], between the |z|^2 of the samples and the chi-square
            distribution; about 0.9 / sqrt(B) for B samples of noise.
    """

    mean: float
    std: float
    kurtosis: float
    norm_ratio: float
    norm_ks: float


def measure_gaussianity(z: Tensor) -> Gaussianity:
    """`Gaussianity` of codes z (B, ...)."""
    from scipy.stats import chi2, kstest

    values = z.detach().double().cpu().flatten(1)
    centred = values - values.mean()
    variance = centred.square().mean()
    squared = values.square().sum(1)
    dimensions = values.shape[1]
    return Gaussianity(
        mean=float(values.mean()),
        std=float(variance.sqrt()),
        kurtosis=float(centred.pow(4).mean() / variance.square() - 3),
        norm_ratio=float(squared.mean() / dimensions),
        norm_ks=float(kstest(squared.numpy(), chi2(dimensions).cdf).statistic),
    )
