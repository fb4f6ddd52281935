"""Volumes of structures in a decoded scan, in mm3, without segmenting it.

There are two measures. `SoftVolume` reads the volume of ventricles from one image. Structures of little contrast are
measured by how much they grow between two images of one brain (`Anatomy.grown_volumes`, deformation.py).

For `SoftVolume`, each voxel of the structure's region contains the structure to the fraction that its intensity v
implies:

    fraction = clip((outside - v) / (outside - inside), 0, 1),    volume = voxel volume x sum of the fractions

The region is the same for all scans of a cohort: the voxels that belong to the structure in at least 5 % of the
training scans' label maps, dilated by one voxel. (A region made from the scan's own label map would reveal its volume
before any decoded voxel is read.) The two intensity levels are the scan's own: a least-squares fit of its autoencoder
reconstruction to its label map, so that they do not depend on the decoded scan that is measured.

On phantoms at 4.5 mm, the volume measured in a scan correlates with its true ventricle volume at 0.97, with another
scan's at -0.1. Hippocampi have no contrast to their surroundings (-0.2), and even at 3 mm the intensities of their true
counterfactuals change with the wrong sign, because the fluid around them grows: their `SoftVolume` says how variable
the region is, no more.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.edits.deformation import measure_growth
from ldae.evaluation.images.image_metrics import BrainMasks, to_arrays

log = logging.getLogger(__name__)

# Label numbers of DLMUSE, which phantoms use as well.
VENTRICLES = (49, 50, 51, 52)
HIPPOCAMPI = (47, 48)
STRUCTURES = {"ventricle": VENTRICLES, "hippocampus": HIPPOCAMPI}
# Measured by registration.
REGISTERED = {"hippocampus": HIPPOCAMPI, "amygdala": (31, 32), "inferior_lateral_ventricle": (49, 50)}
REGIONS = {**STRUCTURES, **REGISTERED}
MIN_FREQUENCY, TRAIN_SCANS = 0.05, 200
BATCH = 16  # label maps that are read at once


@dataclass(frozen=True)
class Levels:
    """Mean intensity inside a structure (CSF for ventricles) and around it."""

    inside: float
    outside: float


@dataclass(frozen=True)
class SoftVolume:
    """Measures the volume of one structure.

    Attributes:
        region: (X, Y, Z) bool.
        voxel_mm3: volume of a voxel.
    """

    region: np.ndarray
    voxel_mm3: float

    def levels(self, image: np.ndarray, fraction: np.ndarray) -> Levels:
        """Intensity levels of an image (X, Y, Z), given the fraction of each voxel that its label map covers."""
        inside = fraction[self.region].astype(np.float64)
        design = np.stack([inside, 1 - inside], 1)
        found = np.linalg.lstsq(design, image[self.region].astype(np.float64), rcond=None)[0]
        return Levels(float(found[0]), float(found[1]))

    def measure(self, image: np.ndarray, levels: Levels) -> float:
        """Volume of the structure in an image (X, Y, Z), mm3; NaN if both levels are equal."""
        contrast = levels.outside - levels.inside
        if abs(contrast) < 1e-6:
            return float("nan")
        fractions = np.clip((levels.outside - image[self.region]) / contrast, 0, 1)
        return float(fractions.sum() * self.voxel_mm3)


def build_soft_volume(context: Context, labels: Sequence[int]) -> SoftVolume | None:
    """The measure of the structure with these labels, its region from training scans; None without label maps."""
    from scipy.ndimage import binary_dilation

    if context.regions is None:
        return None
    rows = context.sample_rows("train", TRAIN_SCANS)
    if not len(rows):
        return None
    total = sum((context.regions(part, labels) > 0.5).sum(0) for part in iterate_batches(rows, BATCH))
    if not np.any(total):
        return None
    region = binary_dilation(total / len(rows) >= MIN_FREQUENCY)
    return SoftVolume(region, float(np.prod(context.spacing)))


def read_true_volumes(context: Context, name: str, rows: Sequence[int]) -> np.ndarray:
    """True volume of a structure of `REGIONS` in each scan, (B,) mm3.

    From the column `<name>_mm3` of the table if all rows have a value, otherwise from the label maps.
    """
    column = f"{name}_mm3"
    if column in context.table and context.table[column].iloc[list(rows)].notna().all():
        return context.table[column].iloc[list(rows)].to_numpy(np.float64)
    batches, voxel_mm3 = iterate_batches(rows, BATCH), float(np.prod(context.spacing))
    return np.concatenate([context.regions(part, REGIONS[name]).sum((1, 2, 3)) * voxel_mm3 for part in batches])


class Anatomy:
    """Measures all structures that the table's label maps show.

    Attributes:
        measures: by structure; empty without label maps.
        registered: structures of the label maps that are measured by registration.
        brains: masks of the scans' reconstructions, which every editor and direction needs again.
    """

    def __init__(self, context: Context):
        self.context, self.brains = context, BrainMasks()
        found = {name: build_soft_volume(context, labels) for name, labels in STRUCTURES.items()}
        self.measures: dict[str, SoftVolume] = {name: measure for name, measure in found.items() if measure}
        self.registered = [name for name in REGISTERED if self._is_labelled(name)]
        if not self.measures:
            log.warning("the table has no usable label maps (labels_path): volumes are not measured")

    def _is_labelled(self, name: str) -> bool:
        """Whether the label maps have a structure, by those of a few training scans."""
        rows = self.context.sample_rows("train", BATCH)
        return (
            self.context.regions is not None
            and len(rows) > 0
            and bool(np.any(self.context.regions(rows.tolist(), REGISTERED[name])))
        )

    @property
    def region(self) -> np.ndarray | None:
        """Where disease and age are expected to show: all structures, dilated once more, (X, Y, Z) bool."""
        from scipy.ndimage import binary_dilation

        if not self.measures:
            return None
        return binary_dilation(np.any([measure.region for measure in self.measures.values()], axis=0))

    def levels(self, rows: Sequence[int], images: Tensor) -> list[dict[str, Levels]]:
        """Intensity levels by structure of each image (B, 1, X, Y, Z); image i shows the anatomy of scan `rows[i]`."""
        rows = [int(row) for row in rows]
        arrays, found = to_arrays(images), [{} for _ in rows]
        for name, measure in self.measures.items():
            fractions = self.context.regions(rows, STRUCTURES[name])
            for levels, image, fraction in zip(found, arrays, fractions, strict=True):
                levels[name] = measure.levels(image, np.asarray(fraction))
        return found

    def volumes(self, images: Tensor, levels: Sequence[Mapping[str, Levels]]) -> dict[str, np.ndarray]:
        """Volume of each structure in images (B, 1, X, Y, Z), mm3, (B,) each."""
        arrays = to_arrays(images)
        return {
            name: np.array([measure.measure(image, own[name]) for image, own in zip(arrays, levels, strict=True)])
            for name, measure in self.measures.items()
        }

    def grown_volumes(self, rows: Sequence[int], before: Tensor, after: Tensor) -> dict[str, np.ndarray]:
        """Volumes of the registered structures in the images after, mm3, (B,) each.

        The images before, (B, 1, X, Y, Z), show the scans `rows` and are taken to have their true volumes.
        """
        if not self.registered:
            return {}
        rows = [int(row) for row in rows]
        fractions = {
            name: torch.from_numpy(np.asarray(self.context.regions(rows, REGISTERED[name]))) for name in self.registered
        }
        growth = measure_growth(before, after, fractions)
        return {
            name: read_true_volumes(self.context, name, rows) * growth[name].double().cpu().numpy()
            for name in self.registered
        }


def interpolate_levels(first: Mapping[str, Levels], second: Mapping[str, Levels], t: float) -> dict[str, Levels]:
    """Levels between those of two scans: the first at t = 0, the second at t = 1."""
    return {
        name: Levels(
            (1 - t) * first[name].inside + t * second[name].inside,
            (1 - t) * first[name].outside + t * second[name].outside,
        )
        for name in first
    }
