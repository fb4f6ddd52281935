"""Diffeomorphisms from stationary velocity fields by scaling and squaring (Arsigny 2006, doi 10.1007/11866565_113).

Fields are (3, X, Y, Z) in mm on a grid that spans the template's box; points are (..., 3) in mm from its centre.
"""

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

SQUARINGS = 3  # velocities reach 25 mm; by the midpoint rule within 0.1 mm of many more


def sample_maps(maps: Tensor, points: Tensor, extent: Tensor, outside: str = "zeros") -> Tensor:
    """Trilinear values of `maps` (C, X, Y, Z) at `points` (..., 3) mm, as (C, ...); `outside` is the padding."""
    grid = (points / (extent / 2)).flip(-1).reshape(1, 1, 1, -1, 3)
    values = grid_sample(maps[None], grid, mode="bilinear", padding_mode=outside, align_corners=False)
    return values.reshape(maps.shape[0], *points.shape[:-1])


def exponentiate(velocity: Tensor, points: Tensor, extent: Tensor, squarings: int = SQUARINGS) -> Tensor:
    """The displacement u of exp(velocity): x -> x + u(x), (3, X, Y, Z) mm; `points` are the grid's own (X, Y, Z, 3)."""
    first = velocity / 2**squarings
    displacement = sample_maps(first, points + first.movedim(0, -1) / 2, extent, "border")
    for _ in range(squarings):
        displacement = displacement + sample_maps(displacement, points + displacement.movedim(0, -1), extent, "border")
    return displacement


def jacobian(displacement: Tensor, spacing: float) -> Tensor:
    """Determinant of the Jacobian of x -> x + u(x), (X, Y, Z), by central differences."""
    rows = [torch.stack(torch.gradient(component, spacing=spacing)) for component in displacement]
    matrix = torch.stack(rows).movedim((0, 1), (-2, -1)) + torch.eye(3)
    return torch.linalg.det(matrix)


def divergence(velocity: Tensor, spacing: float) -> Tensor:
    """Divergence of a field, (X, Y, Z), per mm."""
    return sum(torch.gradient(component, spacing=spacing, dim=axis)[0] for axis, component in enumerate(velocity))
