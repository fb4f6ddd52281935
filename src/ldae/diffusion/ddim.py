"""DDIM (arXiv 2010.02502, equation 12, eta = 0), one rule both ways: the order of the path is the direction."""

import torch
from torch import Tensor

from ldae.diffusion.grids import Path
from ldae.diffusion.guidance import EpsFn


def ask(eps_fn: EpsFn, z: Tensor, path: Path, node: int, clip: float | None = None) -> Tensor:
    """eps of the network at a node, (B, ...) in the dtype of z.

    Args:
        clip: clamp the predicted z_0 to [-clip, clip] and return the eps that belongs to it. Latents have unit
            variance, so this distorts them; off (None) unless one wants what the released sampler does (1.0).
    """
    precision = torch.float64 if z.dtype == torch.float64 else torch.float32  # bf16 would round t itself
    t = torch.full((len(z),), float(path.times[node]), dtype=precision, device=z.device)
    eps = eps_fn(z, t).to(z.dtype)
    alpha, sigma = float(path.alpha[node]), float(path.sigma[node])
    if clip is None or sigma == 0:
        return eps
    z0 = ((z - sigma * eps) / alpha).clamp(-clip, clip)
    return (z - alpha * z0) / sigma


def step(z: Tensor, eps: Tensor, path: Path, node: int) -> Tensor:
    """z at the next node of the path: z_0 and eps are taken for constant on the way."""
    alpha, sigma = path.alpha, path.sigma
    ratio = alpha[node + 1] / alpha[node]
    return float(ratio) * z + float(sigma[node + 1] - ratio * sigma[node]) * eps


def ddim(eps_fn: EpsFn, z: Tensor, path: Path, clip: float | None = None) -> Tensor:
    """Walk z (B, ...) along the path, one evaluation a step, order 1.

    Descending in noise this samples, ascending it inverts: `ddim(eps_fn, z0, path)` undoes
    `ddim(eps_fn, z, path.reversed())` up to discretisation error.
    """
    for node in range(len(path) - 1):
        z = step(z, ask(eps_fn, z, path, node, clip), path, node)
    return z
