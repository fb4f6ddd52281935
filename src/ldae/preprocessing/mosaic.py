"""A picture of one scan for quality control: slices with the contours of its brain mask and of the template's brain."""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.ndimage import binary_erosion

from ldae.utils.files import replacing
from ldae.utils.slices import display_slice, evenly_spaced_positions

PLANES = ("sagittal", "coronal", "axial")  # rows, from top to bottom
SLICES = 6  # in each row
BRAIN_COLOUR, TEMPLATE_COLOUR = (255, 70, 70), (70, 200, 255)
JPEG_QUALITY = 80
GAP = 2  # pixels below each row


def write_mosaic(
    path: Path, head: np.ndarray, affine: np.ndarray, brain: np.ndarray | None, template: np.ndarray | None
) -> None:
    """Write the picture as JPEG.

    Args:
        head: intensities (X, Y, Z).
        affine: voxel to mm, RAS, 4x4; the picture is in RAS whatever the order of the scan's axes.
        brain, template: masks (X, Y, Z) bool on the same grid, or None.
    """
    from PIL import Image

    orientation = nib.io_orientation(affine)
    head, brain, template = (
        None if part is None else nib.apply_orientation(part, orientation) for part in (head, brain, template)
    )
    shown = next((mask for mask in (template, brain) if mask is not None and mask.any()), np.ones_like(head, bool))
    head = head / (float(np.percentile(head[shown], 99.5)) or 1.0)
    masks = ((brain, BRAIN_COLOUR), (template, TEMPLATE_COLOUR))
    contours = [(mask, colour) for mask, colour in masks if mask is not None]
    rows = []
    for plane in PLANES:
        positions = evenly_spaced_positions(shown, plane, SLICES)
        rows.append(np.concatenate([_draw_tile(head, contours, plane, at) for at in positions], axis=1))
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, GAP), (0, width - row.shape[1]), (0, 0))) for row in rows]
    with replacing(path) as temporary:
        Image.fromarray(np.concatenate(rows)).save(temporary, quality=JPEG_QUALITY)


def _draw_tile(
    head: np.ndarray, contours: Sequence[tuple[np.ndarray, tuple[int, int, int]]], plane: str, position: int
) -> np.ndarray:
    """One slice with the contours of the masks, (height, width, 3) uint8; intensities of 1 and above are white."""
    grey = (np.clip(display_slice(head, plane, position), 0, 1) * 255).astype(np.uint8)
    tile = np.repeat(grey[..., None], 3, axis=2)
    for mask, colour in contours:
        inside = display_slice(mask, plane, position)
        tile[inside & ~binary_erosion(inside)] = colour
    return tile
