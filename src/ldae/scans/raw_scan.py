"""Raw scans for a model of preprocessed ones: through the steps that its training scans went through, and back.

The steps are those of `ldae preprocess`, as the training scans' sidecars recorded them, else its defaults. A model that
was trained on scans of one grid gets that very grid, in the template's millimetres.
"""

import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ldae.data.nifti import BadScan
from ldae.data.transforms import Source, Transform
from ldae.preprocessing.job import FAILURES, MODULES, last_line
from ldae.preprocessing.steps import PreprocessedScan, PreprocessingSteps
from ldae.preprocessing.template import resample_onto
from ldae.preprocessing.volume import Volume
from ldae.utils.errors import UserError
from ldae.utils.files import read_json

log = logging.getLogger(__name__)

SAME_MM = 0.1  # grids that differ by less are one
DARK = 1e-3  # of the brightest voxel: below, a ratio of intensities says nothing


@dataclass(frozen=True)
class PreprocessedImage:
    """A scan made from a raw one.

    Attributes:
        image: what the model is to see.
        back: (I, J, K) on the grid of `image` -> the raw scan's own; linear, 0 where unseen.
        gain: the raw scan's intensities over those of `image`, a number or voxel by voxel on the raw scan's grid.
        how: the steps, for people.
    """

    image: nib.spatialimages.SpatialImage
    back: Callable[[np.ndarray], np.ndarray]
    gain: np.ndarray | float = 1.0
    how: str = ""


@dataclass(frozen=True)
class TrainingPreprocessing:
    """Makes raw scans into what a model takes.

    Attributes:
        transform: the model's own, which comes afterwards.
        parameters: of every step, see Pipeline.parameters; None where nobody recorded them.
        affine: voxel to mm, 4x4, of model space on the training scans' common grid; None where they have none.
    """

    transform: Transform
    parameters: Mapping[str, Any] | None = None
    affine: Sequence[Sequence[float]] | None = None

    @property
    def training_scans_preprocessed(self) -> bool:
        """Whether the training scans are known to be preprocessed, or at least to share a grid as such scans do."""
        return self.parameters is not None or self.affine is not None

    @cached_property
    def pipeline(self) -> PreprocessingSteps:
        """The steps. Raises UserError where they cannot be had here."""
        return PreprocessingSteps() if self.parameters is None else PreprocessingSteps.from_parameters(self.parameters)

    def __call__(self, source: Source) -> PreprocessedImage:
        """Make a raw scan into what the model takes.

        Raises:
            BadScan: it cannot be, or a package for it is not installed.
        """
        try:
            self._check_installed()
            pipeline = self.pipeline
        except UserError as error:
            raise BadScan(f"it cannot be preprocessed: {error}") from error
        how = self._said(pipeline)
        log.warning("preprocessing it %s", how)
        folder = _Folder()
        try:
            prepared = pipeline(source, folder.path)
        except BadScan as error:
            raise BadScan(f"it cannot be preprocessed: {error.reason}") from error
        except FAILURES as error:
            raise BadScan(f"it cannot be preprocessed: {type(error).__name__}: {last_line(error)}") from error
        scan = self._placed(prepared.scan)
        image = nib.Nifti1Image(scan.data, scan.affine)
        return PreprocessedImage(image, partial(_back, folder, prepared, scan), _gain(prepared), how)

    def _check_installed(self) -> None:
        steps = {"antspyx": self.pipeline.bias or self.pipeline.registration, "deepbet": self.pipeline.brain}
        missing = [name for name, step in steps.items() if step and find_spec(MODULES.get(name, name)) is None]
        if missing:
            raise UserError(f"{' and '.join(missing)} not installed: pip install 'ldae[preprocess]'")

    def _placed(self, scan: Volume) -> Volume:
        """`scan`, on the model's own grid where the transform alone would put it elsewhere than the training scans."""
        if self.affine is None:
            return scan
        wanted = np.asarray(self.affine, dtype=np.float64)
        own = self.transform.to_model_space(nib.Nifti1Image(scan.data, scan.affine)).affine
        if np.abs(own - wanted).max() < SAME_MM:
            return scan
        return resample_onto(scan, Volume(np.zeros(self.transform.shape, np.float32), wanted))

    def _said(self, pipeline: PreprocessingSteps) -> str:
        start = (
            "as the training scans were" if self.parameters is not None else "with the defaults of `ldae preprocess`"
        )
        return f"{start} ({pipeline.summary})"


class _Folder:
    """A temporary folder that is there as long as this object."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="ldae-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _back(folder: _Folder, prepared: PreprocessedScan, scan: Volume, values: np.ndarray) -> np.ndarray:
    """`values` on the grid of `scan` brought to the raw scan's, by the transforms' files, which lie in `folder`."""
    moved = scan.with_data(values)
    if prepared.transforms is None:
        return resample_onto(moved, prepared.native).data
    return prepared.transforms.to_native(moved, prepared.native, "linear").data


def _gain(prepared: PreprocessedScan) -> np.ndarray:
    """Bias field and normalisation, undone: (X, Y, Z) on the raw scan's grid; its middle value outside the brain."""
    made = prepared.corrected.data
    inside = np.abs(made) > DARK * np.abs(made).max()
    if prepared.native_mask is not None:
        inside &= prepared.native_mask
    ratio = np.divide(prepared.native.data, made, out=np.zeros_like(made), where=inside)
    return np.where(inside, ratio, np.median(ratio[inside])).astype(np.float32)


def read_recorded_parameters(paths: Sequence[str]) -> dict[str, Any] | None:
    """The parameters under which `ldae preprocess` made all scans of `paths`, from their sidecars; None if it did not.

    A template of one's own is named without its folder.
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
