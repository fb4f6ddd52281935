"""The template brain: ICBM 152 2009a T1 with grey- and white-matter maps, as nilearn ships it, and the regions in it.

Every grid of this package spans the same box around the template's brain, so that a point has the same normalised
coordinates (in [-1, 1] from face to face) on all of them, whatever their voxel size. Millimetres are counted from the
centre of the box, axes are RAS.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from math import cos, radians, sin
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool3d

MARGIN = 8  # mm of background around the brain: room for the deformations
MULTIPLE = 6  # mm; the box divides into voxels of 1, 2 and 3 mm

# Region maps by channel, behind the three intensity maps; labels in DLMUSE numbers.
INTENSITY_CHANNELS = ("t1", "grey", "white")
LABELS = {"ventricle_r": 51, "ventricle_l": 52, "hippocampus_r": 47, "hippocampus_l": 48}
CHANNELS = (*INTENSITY_CHANNELS, "mask", *LABELS)

GREY_LEVEL, WHITE_LEVEL, CSF_LEVEL = 0.65, 0.86, 0.25  # the template's own tissue intensities


@dataclass(frozen=True)
class TemplateMaps:
    """Template maps on one grid: `maps` (len(CHANNELS), X, Y, Z) float32 fractions, `depth` (1, X, Y, Z) mm inside the
    brain's edge (negative outside), voxel size `spacing` in mm, `extent` (3,) the box's size in mm, `centre` (3,) its
    centre in MNI mm."""

    maps: Tensor
    depth: Tensor
    spacing: int
    extent: Tensor
    centre: np.ndarray

    def channel(self, name: str) -> Tensor:
        """One map, (X, Y, Z)."""
        return self.maps[CHANNELS.index(name)]

    def points(self) -> Tensor:
        """Centres of the voxels, (X, Y, Z, 3) in mm from the centre of the box."""
        shape = self.maps.shape[1:]
        axes = [(torch.arange(n) + 0.5 - n / 2) * self.spacing for n in shape]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def _read(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A template volume in [0, 1] and its affine, from nilearn's own package data (found without importing nilearn)."""
    import nibabel

    folder = Path(find_spec("nilearn").origin).parent / "datasets" / "data"
    image = nibabel.load(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz")
    return np.asanyarray(image.dataobj).astype(np.float32) / 255, image.affine


def _box(volume: np.ndarray, low: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The part of `volume` from voxel `low` on, `size` voxels, zero where it leaves the volume."""
    out = np.zeros(size, volume.dtype)
    start, stop = np.maximum(low, 0), np.minimum(low + size, volume.shape)
    out[tuple(map(slice, start - low, stop - low))] = volume[tuple(map(slice, start, stop))]
    return out


def _depth(mask: np.ndarray) -> np.ndarray:
    """Millimetres inside the edge of `mask` (negative outside), measured at 2 mm to save seconds."""
    from scipy import ndimage

    coarse = mask[::2, ::2, ::2]
    distance = ndimage.distance_transform_edt(coarse) - ndimage.distance_transform_edt(~coarse)
    for axis in range(3):
        distance = distance.repeat(2, axis)
    return 2 * distance


def _ventricles(csf: np.ndarray, depth: np.ndarray, mni: list[np.ndarray]) -> np.ndarray:
    """The lateral ventricles: the largest deep component of CSF near the middle of the brain."""
    from scipy import ndimage

    x, y, z = mni
    near = (np.abs(x) < 40) & (y > -55) & (y < 40) & (z > -15) & (z < 35) & (depth > 20)
    parts, _ = ndimage.label((csf > 0.5) & near)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    component = parts == sizes.argmax()
    # The third ventricle hangs below the foramina, a slit in the middle plane.
    return component & ~((np.abs(x) < 4) & (z < 4))


def _hippocampi(grey: np.ndarray, mni: list[np.ndarray]) -> np.ndarray:
    """Grey matter in one ellipsoid per side, its long axis rising backwards as the hippocampus does."""
    x, y, z = np.abs(mni[0]) - 27, mni[1] + 23, mni[2] + 14
    tilt = radians(25)
    along, across = cos(tilt) * y - sin(tilt) * z, sin(tilt) * y + cos(tilt) * z
    turn = radians(15)
    along, aside = cos(turn) * along - sin(turn) * x, sin(turn) * along + cos(turn) * x
    return ((aside / 8.5) ** 2 + (along / 20) ** 2 + (across / 8) ** 2 < 1) & (grey > 0.3)


@lru_cache(maxsize=1)
def _full() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All maps at 1 mm in the box, and the centre of the box in MNI mm."""
    (t1, affine), (grey, _), (white, _) = (_read(name) for name in ("t1", "gm", "wm"))
    where = np.argwhere(t1 > 0)
    first, last = where.min(0), where.max(0)
    size = -(-(last - first + 1 + 2 * MARGIN) // MULTIPLE) * MULTIPLE
    low = (first + last + 1 - size) // 2
    t1, grey, white = (_box(volume, low, size) for volume in (t1, grey, white))
    origin = affine[:3, 3] + low
    mni = np.ogrid[tuple(slice(o, o + n) for o, n in zip(origin, size, strict=True))]
    mni = [axis.astype(np.float32) for axis in mni]
    mask = t1 > 0
    depth = _depth(mask)
    ventricles = _ventricles(mask * (1 - grey - white), depth, mni)
    hippocampi = _hippocampi(grey, mni) & ~ventricles
    right = mni[0] > 0
    maps = {
        "t1": t1, "grey": grey, "white": white, "mask": mask, "depth": depth,
        "ventricle_r": ventricles & right, "ventricle_l": ventricles & ~right,
        "hippocampus_r": hippocampi & right, "hippocampus_l": hippocampi & ~right,
    }  # fmt: skip
    return {name: volume.astype(np.float32) for name, volume in maps.items()}, origin + (size - 1) / 2


@lru_cache(maxsize=3)
def load_template(spacing: int) -> TemplateMaps:
    """The template at 1, 2 or 3 mm; coarser voxels are means of the 1 mm ones, that is, fractions of tissue."""
    maps, centre = _full()
    pooled = [avg_pool3d(torch.from_numpy(maps[name])[None], spacing) for name in (*CHANNELS, "depth")]
    extent = torch.tensor(maps["t1"].shape, dtype=torch.float32)
    return TemplateMaps(torch.cat(pooled[:-1]), pooled[-1], spacing, extent, centre)
