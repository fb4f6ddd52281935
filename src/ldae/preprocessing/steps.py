"""The steps that one scan goes through, in memory; each of them may be switched off (None).

bias field -> brain mask -> intensity -> registration -> resampling
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ldae.data.nifti import BadScan, Source, load_scan
from ldae.data.scan_orientation import check_orientation
from ldae.preprocessing.bias import N4
from ldae.preprocessing.brain import BrainExtraction, DeepBet, Stripped, is_skull_stripped
from ldae.preprocessing.intensity import Tissues, WhiteMatter
from ldae.preprocessing.measures import (
    Limits,
    correlate_with_template,
    estimate_noise,
    find_cut_sides,
    measure_volume,
)
from ldae.preprocessing.registration import Registration, Transforms
from ldae.preprocessing.template import Icbm152, Template, TemplateFile, resample, template_at_spacing
from ldae.preprocessing.volume import Volume
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

VERSION = 1  # raise it when the same parameters give other voxels, so that scans are preprocessed again
MODULE_NAMES = {"antspyx": "ants"}  # packages whose module has another name
# What the libraries of the steps raise on scans that they cannot process.
FAILURES = (RuntimeError, ValueError, ArithmeticError, AssertionError, LookupError, TypeError, MemoryError)


@dataclass(frozen=True)
class PreprocessedScan:
    """A scan after all steps.

    Attributes:
        scan: the result, 0 outside the brain if there is a brain mask.
        unmasked: the same before the mask is applied.
        mask: brain mask (X, Y, Z) bool on the grid of `scan`, or None.
        native: the raw scan.
        native_mask: brain mask on the grid of `native`, or None.
        corrected: the raw scan after bias field and intensity, on the grid of `native`, as it was resampled.
        transforms: the registration, or None.
        measures: numbers for quality control by name.
        notes: remarks for quality control.
        offset: what was subtracted from the intensities of the file when `native` was read.
    """

    scan: Volume
    unmasked: Volume
    mask: np.ndarray | None
    native: Volume
    native_mask: np.ndarray | None
    corrected: Volume
    transforms: Transforms | None
    measures: dict[str, float]
    notes: list[str]
    offset: float = 0.0


@dataclass(frozen=True)
class PreprocessingSteps:
    """The steps with all their parameters.

    Attributes:
        bias, brain, registration, intensity: the steps, None if switched off.
        template: the brain to register to.
        limits: beyond these a scan is rejected.
        spacing: voxel size of the result in mm; None for that of the template, or of the scan without registration.
        interpolator: ANTs' name of the interpolation of intensities.
        assume_orientation: RAS or LAS, the axes of scans whose files state none; None rejects such scans. It says what
            the files are, not what is done to them, and is therefore no part of `parameters` and `key`.

    Raises:
        UserError: the steps cannot be combined.
    """

    bias: N4 | None = field(default_factory=N4)
    brain: BrainExtraction | None = field(default_factory=DeepBet)
    registration: Registration | None = field(default_factory=Registration)
    template: Template = field(default_factory=Icbm152)
    intensity: WhiteMatter | Tissues | None = None
    limits: Limits = field(default_factory=Limits)
    spacing: float | None = 1.5
    interpolator: str = "bSpline"
    assume_orientation: str | None = None

    def __post_init__(self) -> None:
        check_orientation(self.assume_orientation)
        if self.spacing is not None and not 0.3 <= self.spacing <= 20:
            raise UserError(f"spacing={self.spacing}: a voxel size between 0.3 and 20 mm is needed")
        if not self.brain and self.registration and isinstance(self.template, Icbm152):
            raise UserError("registration to ICBM 152 needs a brain extraction: choose one, or registration=none")
        if not self.brain and self.intensity:
            raise UserError("intensity by tissue needs a brain mask: choose a brain extraction, or intensity=none")

    @property
    def space(self) -> str:
        """BIDS label of the space of the result, "" for the scan's own."""
        return self.template.name if self.registration else ""

    def parameters(self) -> dict[str, Any]:
        """All parameters by step, as JSON values."""
        names = [step.name for step in fields(self) if step.name != "assume_orientation"]
        return {name: _to_json(getattr(self, name)) for name in names}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], files: bool = False) -> "PreprocessingSteps":
        """The inverse of `parameters`.

        Args:
            files: whether the template may be a file.

        Raises:
            UserError: the parameters are damaged, or the template is a file and `files` is false.
        """
        try:
            steps = cls(**{name: _from_json(value) for name, value in parameters.items()})
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"the recorded parameters of preprocessing are damaged ({error})") from error
        if isinstance(steps.template, TemplateFile) and not files:
            raise UserError(
                f"the training scans were registered to a template of their own, {Path(steps.template.path).name}, "
                "which does not come with the model: run `ldae preprocess` with it first"
            )
        return steps

    @property
    def summary(self) -> str:
        """The steps in a few words."""
        steps = [type(step).__name__ for step in (self.bias, self.brain) if step]
        if self.registration:
            steps.append(f"{self.registration.transform} to {self.template.name}")
        steps += [f"{self.spacing:g} mm"] if self.spacing else []
        return ", ".join([*steps, *([type(self.intensity).__name__] if self.intensity else [])])

    def key(self) -> str:
        """A hash of all parameters."""
        text = json.dumps([VERSION, self.parameters()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def grid(self, scan: Volume) -> Volume:
        """A volume on the grid that `scan` is resampled to."""
        if self.registration:
            return template_at_spacing(self.template, self.spacing or float(self.template.volume().spacing.min()))
        return resample(scan, self.spacing)

    def __call__(self, source: Source, folder: Path) -> PreprocessedScan:
        """Preprocess one scan.

        Args:
            source: a NIfTI file or image.
            folder: receives the files of the transforms.

        Raises:
            BadScan: the scan cannot be read, a step failed on it, or a measure is outside the limits.
        """
        try:
            return self._run(source, folder)
        except FAILURES as error:
            log.debug("a step failed", exc_info=True)
            lines = str(error).strip().splitlines()
            raise BadScan(f"{type(error).__name__}: {lines[-1][:200] if lines else ''}") from error

    def _run(self, source: Source, folder: Path) -> PreprocessedScan:
        loaded = load_scan(source, self.assume_orientation)
        native, notes = Volume(loaded.data, loaded.affine), list(loaded.notes)
        self.limits.check_grid(native)
        corrected = self.bias(native) if self.bias else native
        native_mask = self._extract_brain(native, corrected, notes)
        measures: dict[str, float] = {}
        if native_mask is not None:
            measures = {"head_mm3": measure_volume(native_mask, native), "noise": estimate_noise(native, native_mask)}
            self.limits.check_brain(measures["head_mm3"])
            if sides := find_cut_sides(native_mask, native):
                notes.append(f"the brain reaches the edge of the field of view ({', '.join(sides)}): it may be cut off")
        if self.intensity:
            corrected = corrected.with_data(self.intensity(corrected.data, native_mask))
        transforms = self._register(corrected, native_mask, folder)
        grid = self.grid(corrected)
        unmasked = self._move(corrected, grid, transforms, self.interpolator)
        unmasked = unmasked.with_data(np.maximum(unmasked.data, 0))  # spline interpolation undershoots
        scan, mask = unmasked, None
        if native_mask is not None:
            mask = self._move(native.with_data(native_mask), grid, transforms, "linear").data >= 0.5
            scan = unmasked.with_data(unmasked.data * mask)
        if self.registration:
            measures["affine_determinant"] = transforms.affine_determinant()
            measures["template_correlation"] = correlate_with_template(scan, grid)
            self.limits.check_correlation(measures["template_correlation"], self.registration.transform == "Rigid")
        return PreprocessedScan(
            scan, unmasked, mask, native, native_mask, corrected, transforms, measures, notes, loaded.offset
        )

    def _extract_brain(self, native: Volume, corrected: Volume, notes: list[str]) -> np.ndarray | None:
        if not self.brain:  # None, or the empty config of brain=none
            return None
        if not isinstance(self.brain, Stripped) and is_skull_stripped(native):
            notes.append("already skull-stripped: its own background was taken for the mask")
            return Stripped()(native)
        return self.brain(native if isinstance(self.brain, Stripped) else corrected)

    def _register(self, scan: Volume, mask: np.ndarray | None, folder: Path) -> Transforms | None:
        if not self.registration:
            return None
        brain = scan if mask is None else scan.with_data(scan.data * mask)
        return self.registration(brain, template_at_spacing(self.template, self.registration.spacing), folder)

    def _move(self, volume: Volume, grid: Volume, transforms: Transforms | None, interpolator: str) -> Volume:
        return transforms.to_template(volume, grid, interpolator) if transforms else resample(volume, self.spacing)


def is_installed(package: str) -> bool:
    """Whether a package of the package index is installed."""
    return find_spec(MODULE_NAMES.get(package, package)) is not None


def check_installed(steps: PreprocessingSteps) -> None:
    """Refuse steps whose packages are missing.

    Raises:
        UserError: names the packages and how to install them.
    """
    packages = {"antspyx": steps.bias or steps.registration, "deepbet": steps.brain}
    missing = [name for name, step in packages.items() if step and not is_installed(name)]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed: pip install 'ldae[preprocess]'")


STEPS = {
    step.__name__: step
    for step in (N4, DeepBet, Stripped, Registration, Icbm152, TemplateFile, WhiteMatter, Tissues, Limits)
}


def _to_json(value: Any) -> Any:
    """A step as its class and its fields; other values unchanged."""
    if is_dataclass(value):
        return {"step": type(value).__name__, **json.loads(json.dumps(asdict(value), default=list))}
    return value


def _from_json(value: Any) -> Any:
    """The inverse of `_to_json`."""
    if not isinstance(value, Mapping):
        return value
    arguments = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items() if key != "step"}
    return STEPS[value["step"]](**arguments)
