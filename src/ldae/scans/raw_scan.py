"""Preprocess a raw scan as the training scans were preprocessed, and bring results back to the raw scan's own grid.

The steps are those of `ldae preprocess`, with the parameters that the sidecars of the training scans recorded, or with
its defaults if there are none. If all training scans share one grid, so does the result.
"""

import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ldae.data.nifti import BadScan, Source
from ldae.data.transforms import Transform
from ldae.preprocessing.measures import NO_LIMITS, OutsideLimits
from ldae.preprocessing.steps import PreprocessedScan, PreprocessingSteps, check_installed
from ldae.preprocessing.template import resample_onto
from ldae.preprocessing.volume import Volume
from ldae.utils.errors import UserError
from ldae.utils.files import read_json

log = logging.getLogger(__name__)

SAME_GRID_MM = 0.1  # grids that differ by less are the same
DARK = 1e-3  # share of the brightest voxel; ratios of darker intensities are not meaningful


@dataclass(frozen=True)
class PreprocessedImage:
    """A preprocessed raw scan, and the way back.

    Attributes:
        image: the preprocessed scan.
        to_scan_grid: volume (I, J, K) on the grid of `image` -> the raw scan's grid; linear, 0 outside.
        gain: ratio of the raw scan's intensities to those of `image`: one number, or an array on the raw scan's grid.
        steps: the steps, in words.
        offset: added to the raw scan's intensities after `gain`; not 0 if the background of the file is not 0.
        notes: remarks on the raw scan.
    """

    image: nib.spatialimages.SpatialImage
    to_scan_grid: Callable[[np.ndarray], np.ndarray]
    gain: np.ndarray | float = 1.0
    steps: str = ""
    offset: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingPreprocessing:
    """Preprocesses raw scans as the training scans of a model were preprocessed.

    Attributes:
        transform: the model's own, which is applied afterwards.
        parameters: of every step, see PreprocessingSteps.parameters; None if they were not recorded.
        affine: voxel to mm, 4x4, of model space on the grid that all training scans share; None if they share none.
        assume_orientation: RAS or LAS, the axes of scans whose files state none; None rejects such scans.
        limited: whether scans outside the limits of the training preprocessing are rejected.
    """

    transform: Transform
    parameters: Mapping[str, Any] | None = None
    affine: Sequence[Sequence[float]] | None = None
    assume_orientation: str | None = None
    limited: bool = True

    @property
    def training_scans_preprocessed(self) -> bool:
        """Whether the training scans are known to be preprocessed: by their sidecars, or because they share a grid."""
        return self.parameters is not None or self.affine is not None

    @cached_property
    def steps(self) -> PreprocessingSteps:
        """The steps.

        Raises:
            UserError: their parameters are damaged, or they need a file that does not come with the model.
        """
        steps = PreprocessingSteps() if self.parameters is None else PreprocessingSteps.from_parameters(self.parameters)
        limits = steps.limits if self.limited else NO_LIMITS
        return replace(steps, assume_orientation=self.assume_orientation, limits=limits)

    def __call__(self, source: Source) -> PreprocessedImage:
        """Preprocess a raw scan.

        Raises:
            BadScan: a step fails, or a package for it is not installed.
        """
        try:
            check_installed(self.steps)
        except UserError as error:
            raise BadScan(f"it cannot be preprocessed: {error}") from error
        log.warning("preprocessing the scan %s", self._description)
        folder = _TemporaryFolder()
        try:
            preprocessed = self.steps(source, folder.path)
        except OutsideLimits as error:
            raise BadScan(f"it cannot be preprocessed: {error.finding}; --preprocess --force skips limits") from error
        except BadScan as error:
            raise BadScan(f"it cannot be preprocessed: {error.reason}") from error
        scan = self._on_training_grid(preprocessed.scan)
        image = nib.Nifti1Image(scan.data, scan.affine)
        to_scan_grid = partial(_to_raw_grid, folder, preprocessed, scan)
        return PreprocessedImage(
            image, to_scan_grid, _gain(preprocessed), self._description, preprocessed.offset, tuple(preprocessed.notes)
        )

    def _on_training_grid(self, scan: Volume) -> Volume:
        """`scan`, resampled if the transform alone would not place it on the training scans' grid."""
        if self.affine is None:
            return scan
        expected = np.asarray(self.affine, dtype=np.float64)
        found = self.transform.to_model_space(nib.Nifti1Image(scan.data, scan.affine)).affine
        if np.abs(found - expected).max() < SAME_GRID_MM:
            return scan
        return resample_onto(scan, Volume(np.zeros(self.transform.shape, np.float32), expected))

    @property
    def _description(self) -> str:
        recorded = self.parameters is not None
        start = "as the training scans were preprocessed" if recorded else "with the defaults of `ldae preprocess`"
        return f"{start} ({self.steps.summary})"


class _TemporaryFolder:
    """A temporary folder that is deleted together with this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="ldae-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _to_raw_grid(
    folder: _TemporaryFolder, preprocessed: PreprocessedScan, scan: Volume, values: np.ndarray
) -> np.ndarray:
    """`values` on the grid of `scan`, resampled to the raw scan's grid.

    `folder` contains the files of the spatial transforms; as an argument it is kept as long as this function is.
    """
    moved = scan.with_data(values)
    if preprocessed.transforms is None:
        return resample_onto(moved, preprocessed.native).data
    return preprocessed.transforms.to_native(moved, preprocessed.native, "linear").data


def _gain(preprocessed: PreprocessedScan) -> np.ndarray:
    """Ratio of raw to corrected intensities (bias field, normalisation), on the raw scan's grid.

    Outside the brain it is the median of the brain.
    """
    corrected = preprocessed.corrected.data
    inside = np.abs(corrected) > DARK * np.abs(corrected).max()
    if preprocessed.native_mask is not None:
        inside &= preprocessed.native_mask
    ratio = np.divide(preprocessed.native.data, corrected, out=np.zeros_like(corrected), where=inside)
    return np.where(inside, ratio, np.median(ratio[inside])).astype(np.float32)


def read_recorded_parameters(paths: Sequence[str]) -> dict[str, Any] | None:
    """The parameters with which `ldae preprocess` made the scans of `paths`, from their sidecars.

    None if a scan has no such sidecar, or if the parameters differ between scans. A template that is a file is named
    without its folder.
    """
    found: dict[str, Any] | None = None
    for path in paths:
        try:
            parameters = read_json(str(path).removesuffix(".gz").removesuffix(".nii") + ".json")["Parameters"]
            PreprocessingSteps.from_parameters(parameters, files=True)
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None
        if found is not None and parameters != found:
            return None
        found = parameters
    if found is not None and "path" in found["template"]:
        found["template"] = {**found["template"], "path": Path(found["template"]["path"]).name}
    return found
