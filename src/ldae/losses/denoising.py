"""Losses of stages 2 and 3; noise and timesteps are given."""

from torch import Tensor

from ldae.diffusion.process import Parameterisation
from ldae.diffusion.schedule import Schedule


def per_sample_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def denoising_loss(
    parameterisation: Parameterisation, schedule: Schedule, output: Tensor, z0: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Stage 2: |target - output|^2 with the target of the parameterisation (eps, or v), mean over the batch."""
    return per_sample_mse(output, parameterisation.target(schedule, z0, noise, t)).mean()


def gap_filling_loss(
    parameterisation: Parameterisation,
    schedule: Schedule,
    output: Tensor,
    gradient: Tensor,
    z0: Tensor,
    noise: Tensor,
    t: Tensor,
) -> Tensor:
    """Stage 3, equation of PDAE (arXiv 2212.12990): the estimator fills the frozen network's posterior-mean gap.

    eps: w_t |eps - (eps_theta + c_t G)|^2;  v: |v - (v_theta + G)|^2. `output` is the frozen network's, (B, C, ...).
    """
    coefficient = parameterisation.gap_coefficient(schedule, t).float().view(-1, 1, 1, 1, 1)
    weight = parameterisation.gap_weight(schedule, t).float()
    shifted = output.float() + coefficient * gradient.float()
    return (weight * per_sample_mse(shifted, parameterisation.target(schedule, z0, noise, t))).mean()
