"""Losses of stage 1 (latent diffusion, arXiv 2112.10752; LSGAN, arXiv 1611.04076; weights as in arXiv 2504.08635)."""

from torch import Tensor


def reconstruction_l1(reconstruction: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error over voxels and batch of volumes (B, 1, X, Y, Z) in [0, 1]."""
    return (reconstruction.float() - x.float()).abs().mean()


def kl_divergence(mean: Tensor, std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)) of posteriors (B, C, X, Y, Z), summed over the latent, mean over the batch."""
    mean, variance = mean.float(), std.float().square()
    return 0.5 * (mean.square() + variance - variance.log() - 1).flatten(1).sum(1).mean()


def generator_adversarial(fake_scores: Tensor) -> Tensor:
    """Least-squares GAN loss of the generator, whose target score is 1. The scores have passed no activation."""
    return (fake_scores.float() - 1).square().mean()


def discriminator_adversarial(real_scores: Tensor, fake_scores: Tensor) -> Tensor:
    """Least-squares GAN loss of the discriminator, with target scores 1 for scans and 0 for reconstructions."""
    return 0.5 * ((real_scores.float() - 1).square().mean() + fake_scores.float().square().mean())
