"""Quality measures of every scan, and the limits beyond which a scan is rejected."""

from dataclasses import dataclass

import numpy as np

from ldae.data.nifti import BadScan
from ldae.preprocessing.template import blur_for_spacing, template_brain
from ldae.preprocessing.volume import Volume

CORRELATION_MM = 4.0  # the folding pattern differs between persons, so brains are compared at this resolution
MARGIN_MM = 6.0  # around the template's brain, so that a brain of another size or place lowers the correlation


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


@dataclass(frozen=True)
class Limits:
    """Limits outside of which a scan is rejected.

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
        """Raise BadScan if voxel size or field of view cannot be those of a head."""
        field = scan.spacing * scan.data.shape
        for what, values, (low, high) in (("voxels", scan.spacing, self.voxel_mm), ("field", field, self.field_mm)):
            if values.min() < low or values.max() > high:
                sizes = " x ".join(f"{value:.3g}" for value in values)
                raise BadScan(f"absurd voxel size: {what} of {sizes} mm, outside {low:g} to {high:g}")

    def check_brain(self, mm3: float) -> None:
        """Raise BadScan if the brain is too small or too large."""
        low, high = self.brain_cm3
        if not low <= mm3 / 1000 <= high:
            raise BadScan(f"brain volume {mm3 / 1000:.0f} cm3 is outside {low:g} to {high:g}")

    def check_correlation(self, value: float, rigid: bool = False) -> None:
        """Raise BadScan if the registered brain differs too much from the template."""
        lowest = min(self.correlation, self.rigid_correlation) if rigid else self.correlation
        if value < lowest:
            raise BadScan(f"template correlation {value:.2f} is below {lowest:g}")
