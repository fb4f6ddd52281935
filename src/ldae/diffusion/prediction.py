"""Evaluation of the network at a node of a sampler's path: eps, or the velocity of the probability-flow ODE."""

import torch
from torch import Tensor

from ldae.diffusion.grids import Path
from ldae.diffusion.guidance import EpsFn, GuidedEps


def predict_eps(eps_fn: EpsFn, z: Tensor, path: Path, node: int, clip: float | None = None) -> Tensor:
    """eps at a node of the path, of the shape (B, ...) and dtype of z.

    Args:
        clip: clamp the predicted z_0 to [-clip, clip] and return the eps that corresponds to it. None (the default)
            does not clip: latents have unit variance, so clipping distorts them. The released sampler clips at 1.
    """
    precision = torch.float64 if z.dtype == torch.float64 else torch.float32  # bfloat16 would round t itself
    t = torch.full((len(z),), float(path.times[node]), dtype=precision, device=z.device)
    if isinstance(eps_fn, GuidedEps):
        eps_fn = eps_fn.at(float(path.times[node]))
    eps = eps_fn(z, t).to(z.dtype)
    alpha, sigma = float(path.alpha[node]), float(path.sigma[node])
    if clip is None or sigma == 0:
        return eps
    z0 = ((z - sigma * eps) / alpha).clamp(-clip, clip)
    return (z - alpha * z0) / sigma


def predict_velocity(eps_fn: EpsFn, z: Tensor, path: Path, node: int, clip: float | None = None) -> Tensor:
    """v = (eps - sigma z) / alpha at a node: for z = cos(phi) z_0 + sin(phi) eps, the ODE is dz/dphi = v."""
    alpha, sigma = float(path.alpha[node]), float(path.sigma[node])
    return (predict_eps(eps_fn, z, path, node, clip) - sigma * z) / alpha
