"""Brain extraction: a mask of the brain on the scan's own grid."""

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import nibabel as nib
import numpy as np
from scipy import ndimage

from ldae.data.nifti import BadScan
from ldae.preprocessing.volume import Volume

if TYPE_CHECKING:
    from deepbet import BrainExtraction as DeepBetNetwork

# A brain with all its CSF is smaller than this; a head, even a defaced one, is larger.
LARGEST_BRAIN_MM3 = 2.2e6
CLOSING_MM = 6.0


class BrainExtraction(Protocol):
    """A method that finds the brain."""

    def __call__(self, scan: Volume) -> np.ndarray:
        """Return a mask (X, Y, Z) bool, True in the brain including its ventricles and sulci.

        Raises:
            BadScan: no brain was found.
        """
        ...


@dataclass(frozen=True)
class DeepBet:
    """The network of the package deepbet, which includes its weights.

    Fisch et al. 2024, doi 10.1016/j.compbiomed.2024.108845.

    Attributes:
        threshold: voxels with at least this probability belong to the brain.
        dilate: number of voxel layers added to the mask afterwards; removed if negative.
    """

    threshold: float = 0.5
    dilate: int = 0

    def __call__(self, scan: Volume) -> np.ndarray:
        """See BrainExtraction."""
        image = nib.Nifti1Image(scan.data, scan.affine)
        try:
            _, mask, _ = _load_deepbet().run(image, threshold=self.threshold, n_dilate=self.dilate)
        except (AssertionError, ValueError, IndexError) as error:
            raise BadScan("no brain was found in it") from error
        return np.asarray(mask.dataobj) > 0


@dataclass(frozen=True)
class Stripped:
    """For scans that are already skull-stripped: everything that is not background, closed and filled."""

    def __call__(self, scan: Volume) -> np.ndarray:
        """See BrainExtraction."""
        return close_sulci(scan.data != background_intensity(scan), scan.spacing)


@lru_cache(maxsize=1)
def _load_deepbet() -> "DeepBetNetwork":
    from deepbet import BrainExtraction as DeepBetNetwork

    return DeepBetNetwork(no_gpu=True)


def background_intensity(scan: Volume) -> float:
    """Return the most frequent intensity on the six faces of the volume."""
    faces = [np.take(scan.data, (0, -1), axis=axis).ravel() for axis in range(3)]
    values, counts = np.unique(np.concatenate(faces), return_counts=True)
    return float(values[counts.argmax()])


def close_sulci(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Bridge the sulci of a mask (X, Y, Z) bool: close it by a ball of CLOSING_MM radius and fill its holes."""
    margin = int(np.ceil(CLOSING_MM / spacing.min())) + 1
    padded = np.pad(mask, margin)  # so that the faces of the volume do not limit the closing
    dilated = ndimage.distance_transform_edt(~padded, sampling=spacing) <= CLOSING_MM
    eroded = ndimage.distance_transform_edt(dilated, sampling=spacing) > CLOSING_MM
    inside = tuple(slice(margin, -margin) for _ in range(3))
    return ndimage.binary_fill_holes((eroded | padded)[inside])


def is_skull_stripped(scan: Volume) -> bool:
    """Whether the part of the scan that is not background is no larger than a brain."""
    return bool((scan.data != background_intensity(scan)).sum() * scan.voxel_mm3 < LARGEST_BRAIN_MM3)
