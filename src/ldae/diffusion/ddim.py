"""DDIM (arXiv 2010.02502, equation 12, eta = 0), one rule both ways: the order of the path is the direction."""

from torch import Tensor

from ldae.diffusion.grids import Path
from ldae.diffusion.guidance import EpsFn
from ldae.diffusion.prediction import predict_eps


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
        z = step(z, predict_eps(eps_fn, z, path, node, clip), path, node)
    return z
