"""Losses of stage 1 (latent diffusion, arXiv 2112.10752; LSGAN, arXiv 1611.04076; settings of arXiv 2504.08635)."""

from torch import Tensor


def reconstruction_l1(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error over voxels and batch, volumes in [0, 1]."""
    return (reconstruction.float() - x.float()).abs().mean()


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)), summed over the latent, mean over the batch."""
    mean, variance = mean.float(), std.float().square()
    return 0.5 * (mean.square() + variance - variance.log() - 1).flatten(1).sum(1).mean()


def generator_adversarial(fake_scores: Tensor) -> Tensor:
    """Least-squares GAN, generator's side: the discriminator should answer 1. No activation on the scores."""
    return (fake_scores.float() - 1).square().mean()


def discriminator_adversarial(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Least-squares GAN, discriminator's side: 1 for scans, 0 for reconstructions, half of each."""
    return 0.5 * ((real_scores.float() - 1).square().mean() + fake_scores.float().square().mean())
