"""Inversion that is exact in algebra: explicit midpoint steps in the angle, carrying two neighbouring latents.

    z_{i+1} = z_{i-1} + (phi_{i+1} - phi_{i-1}) v(z_i)

is solved for z_{i-1} as easily as for z_{i+1}, whatever the network: BDIA's idea with gamma = 1 (arXiv 2307.10829), of
the two-step family of BELM (arXiv 2410.07273), on dz/dphi = v (multistep.py). Order 2, one evaluation a step. The price
of a two-step rule without damping: what disturbs the pair while sampling (an edit, fresh noise) is not forgotten on the
way down, and dropping the second tensor loses more than a one-tensor scheme would.
"""

from torch import Tensor

from ldae.diffusion.grids import Path
from ldae.diffusion.guidance import EpsFn
from ldae.diffusion.prediction import predict_velocity


def exact(
    eps_fn: EpsFn, z: Tensor, path: Path, neighbour: Tensor | None = None, clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """Walk the pair along the path, ascending (inversion) or descending (sampling).

    Args:
        z: (B, ...) latent at the path's first node.
        neighbour: latent at its second node, as a walk the other way returned it; None: an Euler step finds it.

    Returns:
        latents at the last and at the second last node. Walking back from them returns the start to rounding error.
    """
    phi = path.angle
    previous, current = z, neighbour
    if current is None:
        current = z + float(phi[1] - phi[0]) * predict_velocity(eps_fn, z, path, 0, clip)
    for node in range(1, len(path) - 1):
        v = predict_velocity(eps_fn, current, path, node, clip)
        previous, current = current, previous + float(phi[node + 1] - phi[node - 1]) * v
    return current, previous
