"""What samplers ask of the network at a node of their path: eps, or the velocity along it."""

import torch
from torch import Tensor

from ldae.diffusion.grids import Path
from ldae.diffusion.guidance import EpsFn, GuidedEps


def predict_eps(eps_fn: EpsFn, z: Tensor, path: Path, node: int, clip: float | None = None) -> Tensor:
    """eps of the network at a node, (B, ...) in the dtype of z.

    Args:
        clip: clamp the predicted z_0 to [-clip, clip] and return the eps that belongs to it. Latents have unit
            variance, so this distorts them; off (None) unless one wants what the released sampler does (1.0).
    """
    precision = torch.float64 if z.dtype == torch.float64 else torch.float32  # bf16 would round t itself
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
    """v = (eps - sigma z) / alpha at a node: with z = cos(phi) z_0 + sin(phi) eps, the ODE is dz/dphi = v."""
    alpha, sigma = float(path.alpha[node]), float(path.sigma[node])
    return (predict_eps(eps_fn, z, path, node, clip) - sigma * z) / alpha
