"""Maps of the template brain: ICBM 152 2009a T1, grey and white matter, as nilearn ships them, and regions in them.

Every grid of this package spans the same box around the template's brain, so that a point has the same normalised
coordinates (in [-1, 1] from face to face) on all of them, whatever their voxel size. Positions are in mm from the
centre of the box, along RAS axes.
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

MARGIN = 8  # mm of background around the brain, which the deformations need
MULTIPLE = 6  # mm; the size of the box is a multiple, so that it divides into voxels of 1, 2 and 3 mm

# Channels of the maps: three intensities, the brain mask, and regions with their DLMUSE label.
INTENSITY_CHANNELS = ("t1", "grey", "white")
LABELS = {"ventricle_r": 51, "ventricle_l": 52, "hippocampus_r": 47, "hippocampus_l": 48}
CHANNELS = (*INTENSITY_CHANNELS, "mask", *LABELS)

GREY_LEVEL, WHITE_LEVEL, CSF_LEVEL = 0.65, 0.86, 0.25  # tissue intensities of the template


@dataclass(frozen=True)
class TemplateMaps:
    """Maps of the template on one grid.

    Attributes:
        maps: (len(CHANNELS), X, Y, Z) float32, fractions of each voxel; T1 in [0, 1].
        depth: (1, X, Y, Z) distance from the brain's surface in mm, positive inside.
        spacing: voxel size in mm.
        extent: (3,) size of the box in mm.
        centre: (3,) centre of the box in MNI mm.
    """

    maps: Tensor
    depth: Tensor
    spacing: int
    extent: Tensor
    centre: np.ndarray

    def channel(self, name: str) -> Tensor:
        """The map of one channel, (X, Y, Z)."""
        return self.maps[CHANNELS.index(name)]

    def points(self) -> Tensor:
        """Centres of the voxels in mm from the centre of the box, (X, Y, Z, 3)."""
        shape = self.maps.shape[1:]
        axes = [(torch.arange(n) + 0.5 - n / 2) * self.spacing for n in shape]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def _read(name: str) -> tuple[np.ndarray, np.ndarray]:
    """A template volume in [0, 1] and its affine, from the package data of nilearn, which is slow to import."""
    import nibabel

    folder = Path(find_spec("nilearn").origin).parent / "datasets" / "data"
    image = nibabel.load(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz")
    return np.asanyarray(image.dataobj).astype(np.float32) / 255, image.affine


def _crop_or_pad(volume: np.ndarray, low: np.ndarray, size: np.ndarray) -> np.ndarray:
    """`size` voxels of `volume` from voxel `low` on, 0 outside the volume."""
    out = np.zeros(size, volume.dtype)
    start, stop = np.maximum(low, 0), np.minimum(low + size, volume.shape)
    out[tuple(map(slice, start - low, stop - low))] = volume[tuple(map(slice, start, stop))]
    return out


def _measure_depth(mask: np.ndarray) -> np.ndarray:
    """Distance from the surface of `mask` in mm, positive inside; computed at 2 mm, which is faster."""
    from scipy import ndimage

    coarse = mask[::2, ::2, ::2]
    distance = ndimage.distance_transform_edt(coarse) - ndimage.distance_transform_edt(~coarse)
    for axis in range(3):
        distance = distance.repeat(2, axis)
    return 2 * distance


def _find_ventricles(csf: np.ndarray, depth: np.ndarray, mni: list[np.ndarray]) -> np.ndarray:
    """Mask of the lateral ventricles: the largest component of CSF deep inside the middle of the brain."""
    from scipy import ndimage

    x, y, z = mni
    near = (np.abs(x) < 40) & (y > -55) & (y < 40) & (z > -15) & (z < 35) & (depth > 20)
    parts, _ = ndimage.label((csf > 0.5) & near)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    component = parts == sizes.argmax()
    # Without the third ventricle, a slit in the midsagittal plane that is connected to the lateral ones.
    return component & ~((np.abs(x) < 4) & (z < 4))


def _find_hippocampi(grey: np.ndarray, mni: list[np.ndarray]) -> np.ndarray:
    """Mask of the hippocampi: grey matter in an ellipsoid on each side, whose long axis rises towards the back."""
    x, y, z = np.abs(mni[0]) - 27, mni[1] + 23, mni[2] + 14
    tilt = radians(25)
    along, across = cos(tilt) * y - sin(tilt) * z, sin(tilt) * y + cos(tilt) * z
    turn = radians(15)
    along, lateral = cos(turn) * along - sin(turn) * x, sin(turn) * along + cos(turn) * x
    return ((lateral / 8.5) ** 2 + (along / 20) ** 2 + (across / 8) ** 2 < 1) & (grey > 0.3)


@lru_cache(maxsize=1)
def _load_at_1_mm() -> tuple[dict[str, np.ndarray], np.ndarray]:
    """All maps in the box at 1 mm, and the centre of the box in MNI mm."""
    (t1, affine), (grey, _), (white, _) = (_read(name) for name in ("t1", "gm", "wm"))
    where = np.argwhere(t1 > 0)
    first, last = where.min(0), where.max(0)
    size = -(-(last - first + 1 + 2 * MARGIN) // MULTIPLE) * MULTIPLE
    low = (first + last + 1 - size) // 2
    t1, grey, white = (_crop_or_pad(volume, low, size) for volume in (t1, grey, white))
    origin = affine[:3, 3] + low
    mni = np.ogrid[tuple(slice(o, o + n) for o, n in zip(origin, size, strict=True))]
    mni = [axis.astype(np.float32) for axis in mni]
    mask = t1 > 0
    depth = _measure_depth(mask)
    ventricles = _find_ventricles(mask * (1 - grey - white), depth, mni)
    hippocampi = _find_hippocampi(grey, mni) & ~ventricles
    right = mni[0] > 0
    maps = {
        "t1": t1, "grey": grey, "white": white, "mask": mask, "depth": depth,
        "ventricle_r": ventricles & right, "ventricle_l": ventricles & ~right,
        "hippocampus_r": hippocampi & right, "hippocampus_l": hippocampi & ~right,
    }  # fmt: skip
    return {name: volume.astype(np.float32) for name, volume in maps.items()}, origin + (size - 1) / 2


@lru_cache(maxsize=3)
def load_template(spacing: int) -> TemplateMaps:
    """The template at 1, 2 or 3 mm; coarser voxels are means of the voxels at 1 mm, so that maps are fractions."""
    maps, centre = _load_at_1_mm()
    pooled = [avg_pool3d(torch.from_numpy(maps[name])[None], spacing) for name in (*CHANNELS, "depth")]
    extent = torch.tensor(maps["t1"].shape, dtype=torch.float32)
    return TemplateMaps(torch.cat(pooled[:-1]), pooled[-1], spacing, extent, centre)
