"""Which slices of a volume to show, and which way up.

Volumes are (X, Y, Z) in RAS. A slice is turned for display with its origin at the upper left: anterior or superior is
up, the subject's left is on the viewer's left (neurological convention), and a sagittal slice faces right.
"""

from collections.abc import Sequence

import numpy as np

PLANES = {"axial": 2, "coronal": 1, "sagittal": 0}  # name -> the axis that a slice cuts


def display_slice(volume: np.ndarray, plane: str, position: int) -> np.ndarray:
    """Slice number `position` of a plane, (height, width)."""
    return np.flipud(np.take(volume, position, PLANES[plane]).T)


def slices_to_show(volume: np.ndarray, voxel: Sequence[int] | None = None) -> dict[str, np.ndarray]:
    """The axial, coronal and sagittal slices through `voxel`, by plane; None: through the middle of the volume."""
    voxel = [size // 2 for size in volume.shape] if voxel is None else voxel
    return {plane: display_slice(volume, plane, voxel[axis]) for plane, axis in PLANES.items()}


def voxel_to_show(region: np.ndarray | None, shape: Sequence[int]) -> tuple[int, int, int]:
    """Voxel to cut at: the centre of `region` (X, Y, Z) bool, or the middle of the volume if there is no region.

    The sagittal slice is moved a little to one side: for symmetric structures the middle shows only the thin wall
    between the ventricles.
    """
    if region is None or not region.any():
        return shape[0] // 2, shape[1] // 2, shape[2] // 2
    x, y, z = np.rint(np.argwhere(region).mean(0)).astype(int).tolist()
    return min(x + max(1, shape[0] // 20), shape[0] - 1), y, z


def evenly_spaced_positions(region: np.ndarray, plane: str, count: int) -> list[int]:
    """`count` positions of slices, evenly spaced inside the extent of `region` (X, Y, Z) bool, its ends left out."""
    others = tuple(axis for axis in range(3) if axis != PLANES[plane])
    occupied = np.flatnonzero(region.any(others))
    return np.linspace(occupied[0], occupied[-1], count + 2).round().astype(int)[1:-1].tolist()
