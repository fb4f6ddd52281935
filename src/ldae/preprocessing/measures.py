"""What is measured on every scan, and the limits beyond which it is set aside."""

from dataclasses import dataclass

import numpy as np

from ldae.data.nifti import BadScan
from ldae.preprocessing.template import blur_for_spacing, template_brain
from ldae.preprocessing.volume import Volume

CORRELATION_MM = 4.0  # folds differ from person to person: brains are compared below this resolution
MARGIN_MM = 6.0  # around the template's brain, so that a brain which does not fill or keep its place shows


def measure_volume(mask: np.ndarray, scan: Volume) -> float:
    """mm3 of a mask on the scan's grid."""
    return float(mask.sum() * scan.voxel_mm3)


def correlate_with_template(brain: Volume, template: Volume) -> float:
    """Pearson correlation of a registered brain with the template, both 0 outside the brain and on one grid.

    Over the template's brain and MARGIN_MM around it, both blurred to CORRELATION_MM.
    """
    from scipy.ndimage import distance_transform_edt

    near = distance_transform_edt(~template_brain(template), sampling=template.spacing) <= MARGIN_MM
    first, second = (blur_for_spacing(volume, CORRELATION_MM).data[near] for volume in (brain, template))
    if first.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def estimate_noise(scan: Volume, mask: np.ndarray) -> float:
    """Standard deviation of the noise as a share of the brain's median intensity.

    From second differences along the axes, which anatomy hardly reaches: their median absolute value in the brightest
    quarter of the brain, white matter, scaled to a Gaussian's standard deviation (1.4826, and sqrt(6) for the weights
    1, -2, 1).
    """
    level = float(np.median(scan.data[mask]))
    bright = mask & (scan.data > np.percentile(scan.data[mask], 75))
    parts = []
    for axis in range(3):
        inner = tuple(slice(1, -1) if other == axis else slice(None) for other in range(3))
        parts.append(np.abs(np.diff(scan.data, n=2, axis=axis)[bright[inner]]))
    return float(1.4826 * np.median(np.concatenate(parts)) / np.sqrt(6) / level) if level > 0 else float("nan")


@dataclass(frozen=True)
class Limits:
    """Ranges (low, high) outside of which a scan is set aside.

    voxel_mm: edges of a voxel; field_mm: edges of the volume; brain_cm3: the brain with its CSF; correlation: lowest
    with the template; rigid_correlation: lowest where heads keep their size, and a small one is right to fit less.
    """

    voxel_mm: tuple[float, float] = (0.3, 5.0)
    field_mm: tuple[float, float] = (100.0, 500.0)
    brain_cm3: tuple[float, float] = (800.0, 2200.0)
    correlation: float = 0.7
    rigid_correlation: float = 0.4

    def check_grid(self, scan: Volume) -> None:
        """Raises BadScan where the header cannot be that of a head."""
        field = scan.spacing * scan.data.shape
        for what, values, (low, high) in (("voxels", scan.spacing, self.voxel_mm), ("field", field, self.field_mm)):
            if values.min() < low or values.max() > high:
                sizes = " x ".join(f"{value:.3g}" for value in values)
                raise BadScan(f"absurd voxel size: {what} of {sizes} mm, outside {low:g} to {high:g}")

    def check_brain(self, mm3: float) -> None:
        """Raises BadScan where no brain is that large or small."""
        low, high = self.brain_cm3
        if not low <= mm3 / 1000 <= high:
            raise BadScan(f"brain volume {mm3 / 1000:.0f} cm3 is outside {low:g} to {high:g}")

    def check_correlation(self, value: float, rigid: bool = False) -> None:
        """Raises BadScan where the registered brain does not look like the template."""
        least = min(self.correlation, self.rigid_correlation) if rigid else self.correlation
        if value < least:
            raise BadScan(f"template correlation {value:.2f} is below {least:g}")
