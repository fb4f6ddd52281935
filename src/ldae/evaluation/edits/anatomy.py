"""Volumes of ventricles and hippocampi read off a decoded scan, in mm3, without segmenting it.

A voxel in the structure's region holds the structure to the share by which its intensity lies between two levels:

    share = clip((outside - v) / (outside - inside), 0, 1),    volume = voxel size x sum of shares over the region

The region is FIXED for a cohort: where the training scans' label maps put the structure in at least 5 % of them, one
voxel wider. A scan's own labels, however dilated, would tell its volume before a decoded voxel is looked at. The two
levels belong to the scan: least squares of its autoencoder reconstruction on its own label map's share of each voxel,
so that a decoded scan is measured with levels that its own decoding cannot move.

On phantoms at 4.5 mm the measure of the scan itself correlates with the true ventricle volume at 0.97, with another
scan's at -0.1. Hippocampi have no contrast to their surroundings there (-0.2): read theirs at fine resolution only.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ldae.data.subsampling import subsample_by_subject
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.images.image_metrics import BrainMasks, to_arrays

log = logging.getLogger(__name__)

# DLMUSE numbers; phantoms use the same.
VENTRICLES = (49, 50, 51, 52)
HIPPOCAMPI = (47, 48)
STRUCTURES = {"ventricle": VENTRICLES, "hippocampus": HIPPOCAMPI}
FREQUENCY, TRAIN_SCANS = 0.05, 200


@dataclass(frozen=True)
class Levels:
    """Intensity inside the structure (CSF for ventricles) and around it."""

    inside: float
    outside: float


@dataclass(frozen=True)
class SoftVolume:
    """Measures one structure. region: (X, Y, Z) bool; voxel: mm3."""

    region: np.ndarray
    voxel: float

    def levels(self, reference: np.ndarray, share: np.ndarray) -> Levels:
        """Both levels of a scan from its reconstruction and its label map's share of each voxel, (X, Y, Z) each."""
        inside = share[self.region].astype(np.float64)
        design = np.stack([inside, 1 - inside], 1)
        found = np.linalg.lstsq(design, reference[self.region].astype(np.float64), rcond=None)[0]
        return Levels(float(found[0]), float(found[1]))

    def shares(self, volume: np.ndarray, levels: Levels) -> np.ndarray:
        """Share of the structure in each voxel of the region, (K,)."""
        gap = levels.outside - levels.inside
        if abs(gap) < 1e-6:
            return np.full(int(self.region.sum()), np.nan)
        return np.clip((levels.outside - volume[self.region]) / gap, 0, 1)

    def measure(self, volume: np.ndarray, levels: Levels) -> float:
        """Volume of the structure in a decoded scan (X, Y, Z), mm3; NaN when the levels are equal."""
        return float(self.shares(volume, levels).sum() * self.voxel)


def build_soft_volume(context: Context, labels: Sequence[int]) -> SoftVolume | None:
    """The measure of the structure with these labels, its region from training scans; None without label maps."""
    from scipy.ndimage import binary_dilation

    if context.regions is None:
        return None
    rows = subsample_by_subject(context.rows("train"), context.table["subject"].tolist(), TRAIN_SCANS, context.seed)
    total, count = 0.0, 0
    for part in iterate_batches(rows, 16):
        total = total + (context.regions(part, labels) > 0.5).sum(0)
        count += len(part)
    if not count or not np.any(total):
        return None
    region = binary_dilation(total / count >= FREQUENCY)
    return SoftVolume(region, float(np.prod(context.spacing)))


def read_true_volumes(context: Context, name: str, rows: Sequence[int]) -> np.ndarray:
    """(B,) mm3 of structure `name` ("ventricle", "hippocampus"): the table's column, else from the label maps."""
    column = f"{name}_mm3"
    if column in context.table and context.table[column].iloc[list(rows)].notna().all():
        return context.table[column].iloc[list(rows)].to_numpy(np.float64)
    voxel = float(np.prod(context.spacing))
    parts = [context.regions(part, STRUCTURES[name]).sum((1, 2, 3)) * voxel for part in iterate_batches(rows, 16)]
    return np.concatenate(parts)


class Anatomy:
    """Soft volumes of the structures that the table's label maps show, and `brains`, the masks of the scans' own
    reconstructions, which every editor and direction asks for anew.
    """

    def __init__(self, context: Context):
        self.context, self.brains = context, BrainMasks()
        found = {name: build_soft_volume(context, labels) for name, labels in STRUCTURES.items()}
        self.measures: dict[str, SoftVolume] = {name: measure for name, measure in found.items() if measure}
        if not self.measures:
            log.warning("the table has no usable label maps (labels_path): volumes are not measured")

    @property
    def region(self) -> np.ndarray | None:
        """(X, Y, Z) bool: where disease and age are expected to show, the structures one voxel wider still."""
        from scipy.ndimage import binary_dilation

        if not self.measures:
            return None
        return binary_dilation(np.any([measure.region for measure in self.measures.values()], axis=0))

    def levels(self, rows: Sequence[int], images: Tensor) -> list[dict[str, Levels]]:
        """Intensity levels of each of the scans `rows`, from images (B, 1, X, Y, Z) that show the same anatomy."""
        rows = [int(row) for row in rows]
        arrays, found = to_arrays(images), [{} for _ in rows]
        for name, measure in self.measures.items():
            for levels, image, share in zip(found, arrays, self.context.regions(rows, STRUCTURES[name]), strict=True):
                levels[name] = measure.levels(image, np.asarray(share))
        return found

    def volumes(self, images: Tensor, levels: Sequence[Mapping[str, Levels]]) -> dict[str, np.ndarray]:
        """mm3 by structure, (B,) each."""
        arrays = to_arrays(images)
        return {
            name: np.array([measure.measure(image, own[name]) for image, own in zip(arrays, levels, strict=True)])
            for name, measure in self.measures.items()
        }


def interpolate_levels(first: Mapping[str, Levels], second: Mapping[str, Levels], share: float) -> dict[str, Levels]:
    """Levels on the line between those of two scans."""
    return {
        name: Levels(
            (1 - share) * first[name].inside + share * second[name].inside,
            (1 - share) * first[name].outside + share * second[name].outside,
        )
        for name in first
    }
