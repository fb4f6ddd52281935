"""Losses of stage 2 (DDPM, arXiv 2006.11239, equation 14) and of stage 3 (PDAE, arXiv 2212.12990)."""

from torch import Tensor

from ldae.diffusion.process import Parameterisation
from ldae.diffusion.schedule import Schedule


def per_sample_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample: (B, ...) -> (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def denoising_loss(
    parameterisation: Parameterisation, schedule: Schedule, output: Tensor, z0: Tensor, noise: Tensor, t: Tensor
) -> Tensor:
    """Stage 2: |target - output|^2, mean over elements and batch. The target is eps or v, by the parameterisation.

    Args:
        output, z0, noise: the U-Net's output, the latents and their noise, (B, C, X, Y, Z) each.
        t: (B,) timesteps.
    """
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
    """Stage 3: w_t |eps - (eps_theta + c_t G)|^2, or |v - (v_theta + G)|^2, mean over elements and batch.

    The gradient estimate G fills the gap that the frozen U-Net leaves to the posterior mean.

    Args:
        output: the frozen U-Net's, eps_theta or v_theta, (B, C, X, Y, Z).
        gradient: G, of the same shape.
        z0, noise: the latents and their noise, of the same shape.
        t: (B,) timesteps.
    """
    coefficient = parameterisation.gap_coefficient(schedule, t).float().view(-1, 1, 1, 1, 1)
    weight = parameterisation.gap_weight(schedule, t).float()
    shifted = output.float() + coefficient * gradient.float()
    return (weight * per_sample_mse(shifted, parameterisation.target(schedule, z0, noise, t))).mean()
