"""The grid of a view: voxel size and number of voxels, which may be other than those of the volumes."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ldae.data.transforms import Transform
from ldae.utils.errors import UserError

Spacing = tuple[float, float, float]


def with_grid(transform: Transform, shape: Sequence[int] | None, spacing: float | Sequence[float] | None) -> Transform:
    """`transform` with another grid; None keeps its own.

    Raises:
        UserError: a voxel size is asked for, but the volumes keep that of each scan.
    """
    if spacing is not None and transform.spacing is None:
        raise UserError(f"data.view.spacing={spacing}: the volumes keep each scan's voxel size, so the view must, too")
    return Transform(
        transform.shape if shape is None else shape,
        transform.spacing if spacing is None else spacing,
        transform.intensity,
        transform.orientation,
        transform.assume_orientation,
    )


def resample_centred(x: Tensor, spacing: Spacing | None, shape: Sequence[int], new_spacing: Spacing | None) -> Tensor:
    """Maps (B, C, X, Y, Z) on another grid with the same centre, by linear interpolation; 0 outside of `x`.

    Args:
        spacing: voxel size of `x` in mm; None: that of the result.
        shape: voxels (X', Y', Z') of the result.
        new_spacing: voxel size of the result in mm.

    Returns:
        (B, C, X', Y', Z'); `x` itself if the grid is the same.
    """
    ratio = [1.0] * 3 if spacing is None or new_spacing is None else np.divide(new_spacing, spacing).tolist()
    if tuple(shape) == tuple(x.shape[2:]) and all(value == 1 for value in ratio):
        return x
    # grid_sample counts each axis of `x` from -1 to 1, the last axis first.
    axes = [
        (torch.arange(new, dtype=torch.float32, device=x.device) - (new - 1) / 2) * (2 * step / old)
        for new, step, old in zip(shape, ratio, x.shape[2:], strict=True)
    ]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)
    grid = grid.expand(len(x), *grid.shape)
    return functional.grid_sample(x.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
