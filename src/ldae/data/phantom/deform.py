"""Diffeomorphisms from stationary velocity fields by scaling and squaring (Arsigny 2006, doi 10.1007/11866565_113).

Fields are (3, X, Y, Z) in mm on a grid that spans the template's box. Points are (..., 3) in mm from its centre.
"""

from torch import Tensor
from torch.nn.functional import grid_sample

SQUARINGS = 3  # with the midpoint rule, within 0.1 mm of the limit for velocities up to 25 mm


def sample_maps(maps: Tensor, points: Tensor, extent: Tensor, outside: str = "zeros") -> Tensor:
    """Interpolate maps (C, X, Y, Z) trilinearly at points (..., 3) mm, as (C, ...).

    Args:
        extent: (3,) size of the box in mm.
        outside: padding mode of grid_sample, "zeros" or "border".
    """
    grid = (points / (extent / 2)).flip(-1).reshape(1, 1, 1, -1, 3)
    values = grid_sample(maps[None], grid, mode="bilinear", padding_mode=outside, align_corners=False)
    return values.reshape(maps.shape[0], *points.shape[:-1])


def exponentiate(velocity: Tensor, points: Tensor, extent: Tensor, squarings: int = SQUARINGS) -> Tensor:
    """The displacement u of the diffeomorphism exp(velocity): x -> x + u(x), (3, X, Y, Z) mm.

    Args:
        velocity: (3, X, Y, Z) mm.
        points: centres of the grid's voxels, (X, Y, Z, 3) mm.
        extent: (3,) size of the box in mm.
    """
    first = velocity / 2**squarings
    displacement = sample_maps(first, points + first.movedim(0, -1) / 2, extent, "border")
    for _ in range(squarings):
        displacement = displacement + sample_maps(displacement, points + displacement.movedim(0, -1), extent, "border")
    return displacement
