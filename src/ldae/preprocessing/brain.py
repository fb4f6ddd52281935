"""Where the brain is: a mask on the scan's own grid."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import nibabel as nib
import numpy as np
from scipy import ndimage

from ldae.data.nifti import BadScan
from ldae.preprocessing.volume import Volume

# A brain with all its CSF stays below; a head, even defaced, lies above.
LARGEST_BRAIN_MM3 = 2.2e6
CLOSING_MM = 6.0


class BrainExtraction(Protocol):
    """How the brain is found."""

    def __call__(self, scan: Volume) -> np.ndarray:
        """(X, Y, Z) bool, True in the brain with its ventricles and sulci. Raises BadScan."""
        ...


@dataclass(frozen=True)
class DeepBet:
    """A network (Fisch et al. 2024, doi 10.1016/j.compbiomed.2024.108845) whose weights come with its package.

    threshold: of its probability; dilate: layers of voxels added (negative: removed) afterwards.
    """

    threshold: float = 0.5
    dilate: int = 0

    def __call__(self, scan: Volume) -> np.ndarray:
        """See BrainExtraction."""
        image = nib.Nifti1Image(scan.data, scan.affine)
        try:
            _, mask, _ = _network().run(image, threshold=self.threshold, n_dilate=self.dilate)
        except (AssertionError, ValueError, IndexError) as error:
            raise BadScan("no brain was found in it") from error
        return np.asarray(mask.dataobj) > 0


@dataclass(frozen=True)
class Stripped:
    """The scan is skull-stripped already: what is not background, closed and filled."""

    def __call__(self, scan: Volume) -> np.ndarray:
        """See BrainExtraction."""
        return close_sulci(scan.data != background_intensity(scan), scan.spacing)


@lru_cache(maxsize=1)
def _network() -> Any:
    from deepbet import BrainExtraction as Network

    return Network(no_gpu=True)


def background_intensity(scan: Volume) -> float:
    """The most frequent intensity on the faces of the volume."""
    faces = [np.take(scan.data, (0, -1), axis=axis).ravel() for axis in range(3)]
    values, counts = np.unique(np.concatenate(faces), return_counts=True)
    return float(values[counts.argmax()])


def close_sulci(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """`mask` with sulci bridged, (X, Y, Z) bool: closed by a ball of CLOSING_MM and filled."""
    margin = int(np.ceil(CLOSING_MM / spacing.min())) + 1
    padded = np.pad(mask, margin)  # a ball must not see the volume's faces
    far = ndimage.distance_transform_edt(~padded, sampling=spacing) <= CLOSING_MM
    near = ndimage.distance_transform_edt(far, sampling=spacing) > CLOSING_MM
    inside = tuple(slice(margin, -margin) for _ in range(3))
    return ndimage.binary_fill_holes((near | padded)[inside])


def is_skull_stripped(scan: Volume) -> bool:
    """Whether what is not background is no larger than a brain."""
    return bool((scan.data != background_intensity(scan)).sum() * scan.voxel_mm3 < LARGEST_BRAIN_MM3)
