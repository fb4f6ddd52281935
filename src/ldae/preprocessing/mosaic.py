"""A scan at a glance: slices in three planes with the contours of its brain mask and of the template's brain."""

from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import binary_erosion

from ldae.utils.files import replacing

SLICES = 6  # a plane
BRAIN, TEMPLATE = (255, 70, 70), (70, 200, 255)
QUALITY = 80  # of the JPEG


def write_mosaic(
    path: Path, head: np.ndarray, affine: np.ndarray, brain: np.ndarray | None, template: np.ndarray | None
) -> None:
    """Write a JPEG. head: (X, Y, Z) with its affine; brain and template: masks on the same grid, or None."""
    from PIL import Image

    orientation = nib.io_orientation(affine)  # to RAS, so that every scan lies the same way
    head, brain, template = (
        None if part is None else nib.apply_orientation(part, orientation) for part in (head, brain, template)
    )
    shown = next((mask for mask in (template, brain) if mask is not None and mask.any()), np.ones_like(head, bool))
    top = float(np.percentile(head[shown], 99.5)) or 1.0
    rows = []
    for axis in range(3):
        occupied = np.flatnonzero(shown.any(tuple(other for other in range(3) if other != axis)))
        places = np.linspace(occupied[0], occupied[-1], SLICES + 2).round().astype(int)[1:-1]
        tiles = [_tile(head, [(brain, BRAIN), (template, TEMPLATE)], axis, place, top) for place in places]
        rows.append(np.concatenate(tiles, axis=1))
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 2), (0, width - row.shape[1]), (0, 0))) for row in rows]
    with replacing(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, quality=QUALITY)


def _tile(head: np.ndarray, masks: list, axis: int, place: int, top: float) -> np.ndarray:
    """(height, width, 3) uint8: superior or anterior up."""
    cut = np.rot90(np.take(head, place, axis))
    tile = np.repeat((np.clip(cut / top, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)
    for mask, colour in masks:
        if mask is not None:
            inside = np.rot90(np.take(mask, place, axis))
            tile[inside & ~binary_erosion(inside)] = colour
    return tile
