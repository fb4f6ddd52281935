"""DDIM (arXiv 2010.02502, equation 12 with eta = 0). The order of the path decides between sampling and inversion."""

from torch import Tensor

from ldae.diffusion.grids import Path
from ldae.diffusion.guidance import EpsFn
from ldae.diffusion.prediction import predict_eps


def step(z: Tensor, eps: Tensor, path: Path, node: int) -> Tensor:
    """z at node + 1 from z and eps at `node`, with z_0 and eps held constant over the step."""
    alpha, sigma = path.alpha, path.sigma
    ratio = alpha[node + 1] / alpha[node]
    return float(ratio) * z + float(sigma[node + 1] - ratio * sigma[node]) * eps


def ddim(eps_fn: EpsFn, z: Tensor, path: Path, clip: float | None = None) -> Tensor:
    """z (B, ...) at the last node of the path, from z at its first node; order 1, one evaluation per step.

    A path of descending noise samples, an ascending one inverts: `ddim(eps_fn, z0, path)` is undone by
    `ddim(eps_fn, z, path.reversed())` up to discretisation error.
    """
    for node in range(len(path) - 1):
        z = step(z, predict_eps(eps_fn, z, path, node, clip), path, node)
    return z
