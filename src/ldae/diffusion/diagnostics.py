"""What tells a good diffusion autoencoder from a bad one: the posterior-mean gap, and how Gaussian its codes are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldae.diffusion.guidance import EpsFn
from ldae.diffusion.process import add_noise, eps_to_z0
from ldae.diffusion.schedule import Schedule


@dataclass(frozen=True)
class GapCurve:
    """The gap by timestep; all (K,) float64.

    Attributes:
        timesteps: t.
        gap: root mean square of mu(z_t, z_0) - mu_theta(z_t), the posterior means of z_{t-1}.
        z0_error: root mean square of z_0 - z_0,theta, the same gap before its factor.
    """

    timesteps: Tensor
    gap: Tensor
    z0_error: Tensor

    @property
    def rms(self) -> float:
        """The number: root mean square of the gap over the timesteps."""
        return float(self.gap.square().mean().sqrt())

    def filled_share(self, filled: "GapCurve") -> float:
        """Share of the squared gap that another prediction (guided by y) fills: 0 none, 1 all, negative if worse."""
        return float(1 - filled.gap.square().mean() / self.gap.square().mean())


@torch.no_grad()
def posterior_mean_gap(
    eps_fn: EpsFn, z0: Tensor, schedule: Schedule, timesteps: Sequence[int], noise: Callable[[int], Tensor]
) -> GapCurve:
    """Gap between the posterior mean that a prediction implies and the true one (PDAE, arXiv 2212.12990, section 3).

    q(z_{t-1} | z_t, z_0) has mean k z_0 + (..) z_t with k = sqrt(A_{t-1}) (1 - a_t) / (1 - A_t), so the gap is k times
    the error of z_0.

    Args:
        eps_fn: unconditional for the gap as it is, guided by y for the gap as filled.
        z0: (B, ...) latents.
        timesteps: whole t in [0, T-1].
        noise: noise(t), like z0; give both predictions the same.
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
    """How far codes are from standard normal noise.

    Attributes:
        mean, std: over all numbers; 0 and 1 for noise.
        kurtosis: excess over a normal's, 0 for noise.
        norm_ratio: mean of |z|^2 over its expectation, the number of dimensions.
        norm_ks: Kolmogorov-Smirnov distance between the samples' |z|^2 and chi-square; 0 to 1, about 0.9 / sqrt(B) for
            B samples of noise.
    """

    mean: float
    std: float
    kurtosis: float
    norm_ratio: float
    norm_ks: float


def measure_gaussianity(z: Tensor) -> Gaussianity:
    """Gaussianity of codes z (B, ...)."""
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
