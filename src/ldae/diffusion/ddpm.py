"""Ancestral sampling of DDPM (arXiv 2006.11239, algorithm 2) between the nodes of any path (arXiv 2102.09672)."""

import math
from collections.abc import Callable

from torch import Tensor

from ldae.diffusion.grids import Path
from ldae.diffusion.guidance import EpsFn
from ldae.diffusion.prediction import predict_eps


def ddpm(eps_fn: EpsFn, z: Tensor, path: Path, noise: Callable[[int], Tensor], clip: float | None = None) -> Tensor:
    """Draw z_0 from z (B, ...) along a path of descending noise, one evaluation per step.

    With A of the current node, B of the next node and a = A / B, a step draws from q(z_next | z, z_0), which has
    mean [sqrt(B) (1 - a) z_0 + sqrt(a) (1 - B) z] / (1 - A) and variance (1 - B) (1 - a) / (1 - A).

    Args:
        noise: standard normal noise of step i, of the shape of z; not called for steps of variance 0.
    """
    for node in range(len(path) - 1):
        alpha, sigma = float(path.alpha[node]), float(path.sigma[node])
        z0 = (z - sigma * predict_eps(eps_fn, z, path, node, clip)) / alpha
        added = -math.expm1(path.log_alpha_bar[node] - path.log_alpha_bar[node + 1])  # 1 - a
        remaining = float(path.sigma[node + 1]) ** 2  # 1 - B
        z = float(path.alpha[node + 1]) * added / sigma**2 * z0 + math.sqrt(1 - added) * remaining / sigma**2 * z
        variance = remaining * added / sigma**2
        if variance > 0:
            z = z + math.sqrt(variance) * noise(node)
    return z
