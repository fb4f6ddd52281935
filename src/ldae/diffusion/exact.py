"""Inversion without discretisation error: explicit midpoint steps in the angle phi, on two neighbouring latents.

    z_{i+1} = z_{i-1} + (phi_{i+1} - phi_{i-1}) v(z_i)

can be solved for z_{i-1} as directly as for z_{i+1}, for any network. This is BDIA with gamma = 1 (arXiv 2307.10829),
a member of the two-step family of BELM (arXiv 2410.07273), applied to dz/dphi = v (multistep.py). Order 2, one
evaluation per step. The disadvantage of a two-step rule without damping: a disturbance of the pair during sampling (an
edit, fresh noise) does not decay, and without the second latent the error is larger than that of a one-step scheme.
"""

from torch import Tensor

from ldae.diffusion.grids import Path
from ldae.diffusion.guidance import EpsFn
from ldae.diffusion.prediction import predict_velocity


def exact(
    eps_fn: EpsFn, z: Tensor, path: Path, neighbour: Tensor | None = None, clip: float | None = None
) -> tuple[Tensor, Tensor]:
    """The pair of latents at the end of an ascending (inversion) or descending (sampling) path.

    Args:
        z: latent at the first node of the path, (B, ...).
        neighbour: latent at its second node, as returned by the walk in the other direction; None: one Euler step
            from z approximates it.

    Returns:
        Latents at the last and at the second last node. Walking back from them returns the start up to rounding error.
    """
    phi = path.angle
    previous, current = z, neighbour
    if current is None:
        current = z + float(phi[1] - phi[0]) * predict_velocity(eps_fn, z, path, 0, clip)
    for node in range(1, len(path) - 1):
        v = predict_velocity(eps_fn, current, path, node, clip)
        previous, current = current, previous + float(phi[node + 1] - phi[node - 1]) * v
    return current, previous
