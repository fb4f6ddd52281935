"""Quality measures of every scan, and the limits beyond which a scan is rejected."""

from dataclasses import dataclass

import nibabel as nib
import numpy as np

from ldae.data.nifti import BadScan
from ldae.preprocessing.template import blur_for_spacing, template_brain
from ldae.preprocessing.volume import Volume

CORRELATION_MM = 4.0  # the folding pattern differs between persons, so brains are compared at this resolution
CUT_CM2 = 15.0  # area of the brain on a face of the volume from which it may be cut off; a brainstem has 7
TOLERANCE = 1e-3  # relative, of the limits: headers and oblique affines round voxel sizes
SIDES = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))
MARGIN_MM = 6.0  # around the template's brain, so that a brain of another size or place lowers the correlation


class OutsideLimits(BadScan):
    """A measure of a scan is outside of the limits; `finding` says which, without the remedy."""

    def __init__(self, finding: str, key: str) -> None:
        super().__init__(f"{finding}; --set preprocess.limits.{key}=... changes the limit")
        self.finding = finding


def measure_volume(mask: np.ndarray, scan: Volume) -> float:
    """Volume in mm3 of a mask on the scan's grid."""
    return float(mask.sum() * scan.voxel_mm3)


def correlate_with_template(brain: Volume, template: Volume) -> float:
    """Pearson correlation of a registered brain with the template.

    Both are 0 outside the brain and on the same grid. They are blurred to CORRELATION_MM and compared over the
    template's brain and MARGIN_MM around it.
    """
    from scipy.ndimage import distance_transform_edt

    near = distance_transform_edt(~template_brain(template), sampling=template.spacing) <= MARGIN_MM
    first, second = (blur_for_spacing(volume, CORRELATION_MM).data[near] for volume in (brain, template))
    if first.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def estimate_noise(scan: Volume, mask: np.ndarray) -> float:
    """Standard deviation of the noise as a fraction of the brain's median intensity.

    Second differences along the axes contain little anatomy. The median of their absolute values in the brightest
    quarter of the brain (white matter) is scaled to the standard deviation of a Gaussian: 1.4826, and sqrt(6) for the
    weights 1, -2, 1.
    """
    level = float(np.median(scan.data[mask]))
    bright = mask & (scan.data > np.percentile(scan.data[mask], 75))
    differences = []
    for axis in range(3):
        inner = tuple(slice(1, -1) if other == axis else slice(None) for other in range(3))
        differences.append(np.abs(np.diff(scan.data, n=2, axis=axis)[bright[inner]]))
    return float(1.4826 * np.median(np.concatenate(differences)) / np.sqrt(6) / level) if level > 0 else float("nan")


def find_cut_sides(mask: np.ndarray, scan: Volume) -> list[str]:
    """Sides on which the brain reaches the edge of the field of view, such as "superior"."""
    sides = []
    for axis, (place, sign) in enumerate(nib.io_orientation(scan.affine)):
        voxel_cm2 = scan.voxel_mm3 / scan.spacing[axis] / 100
        low, high = SIDES[int(place)][:: int(sign)]
        for side, index in ((low, 0), (high, -1)):
            if np.take(mask, index, axis=axis).sum() * voxel_cm2 > CUT_CM2:
                sides.append(side)
    return sorted(sides)


@dataclass(frozen=True)
class Limits:
    """Limits outside of which a scan is rejected, with a relative tolerance of TOLERANCE.

    Attributes:
        voxel_mm: lowest and highest edge length of a voxel.
        field_mm: lowest and highest edge length of the field of view.
        brain_cm3: lowest and highest volume of the brain with its CSF.
        correlation: lowest correlation with the template.
        rigid_correlation: the same after a rigid registration, which keeps the size of the head, so that a small head
            fits the template less well even if it is registered correctly.
    """

    voxel_mm: tuple[float, float] = (0.3, 5.0)
    field_mm: tuple[float, float] = (100.0, 500.0)
    brain_cm3: tuple[float, float] = (800.0, 2200.0)
    correlation: float = 0.7
    rigid_correlation: float = 0.4

    def check_grid(self, scan: Volume) -> None:
        """Raise OutsideLimits if voxel size or field of view cannot be those of a head."""
        field = scan.spacing * scan.data.shape
        for what, key, values in (("voxel size", "voxel_mm", scan.spacing), ("field of view", "field_mm", field)):
            low, high = getattr(self, key)
            if not (_within(values.min(), low, high) and _within(values.max(), low, high)):
                sizes = " x ".join(f"{value:.3g}" for value in values)
                raise OutsideLimits(f"{what} of {sizes} mm is outside {low:g} to {high:g} mm", key)

    def check_brain(self, mm3: float) -> None:
        """Raise OutsideLimits if the brain is too small or too large."""
        low, high = self.brain_cm3
        if not _within(mm3 / 1000, low, high):
            raise OutsideLimits(f"brain volume {mm3 / 1000:.0f} cm3 is outside {low:g} to {high:g}", "brain_cm3")

    def check_correlation(self, value: float, rigid: bool = False) -> None:
        """Raise OutsideLimits if the registered brain differs too much from the template."""
        key = "rigid_correlation" if rigid and self.rigid_correlation < self.correlation else "correlation"
        lowest = getattr(self, key)
        if value < lowest - TOLERANCE:
            raise OutsideLimits(f"template correlation {value:.2f} is below {lowest:g}", key)


NO_LIMITS = Limits((0.0, np.inf), (0.0, np.inf), (0.0, np.inf), -1.0, -1.0)


def _within(value: float, low: float, high: float) -> bool:
    return low * (1 - TOLERANCE) <= value <= high * (1 + TOLERANCE)
