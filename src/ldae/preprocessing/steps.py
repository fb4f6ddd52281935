"""What is done to one scan, step by step, in memory; each step may be off (None).

bias field -> brain mask -> registration -> resampling -> intensity
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldae.data.transforms import Source
from ldae.preprocessing.bias import N4
from ldae.preprocessing.brain import BrainExtraction, DeepBet, Stripped, is_skull_stripped
from ldae.preprocessing.intensity import Tissues, WhiteMatter
from ldae.preprocessing.measures import Limits, correlate_with_template, estimate_noise, measure_volume
from ldae.preprocessing.registration import Registration, Transforms
from ldae.preprocessing.template import Icbm152, Template, TemplateFile, resample, template_at_spacing
from ldae.preprocessing.volume import Volume
from ldae.utils.errors import UserError

VERSION = 1  # of the arithmetic: raise it when the same parameters give other voxels, so that scans are made anew


@dataclass(frozen=True)
class PreprocessedScan:
    """A scan that has been through the pipeline."""

    scan: Volume  # as models take it: 0 outside the brain, where one was looked for
    unmasked: Volume  # the same before the mask
    mask: np.ndarray | None  # on the grid of `scan`
    native: Volume  # the scan as it came
    native_mask: np.ndarray | None  # on the scan's own grid
    corrected: Volume  # on that grid too: after bias field and intensity, as it was resampled
    transforms: Transforms | None
    measures: dict[str, float]
    notes: list[str]


@dataclass(frozen=True)
class PreprocessingSteps:
    """The steps, where to, and what is still believed.

    spacing: voxel size of the result in mm, None for that of the template or of the scan; interpolator: ANTs' name.
    """

    bias: N4 | None = field(default_factory=N4)
    brain: BrainExtraction | None = field(default_factory=DeepBet)
    registration: Registration | None = field(default_factory=Registration)
    template: Template = field(default_factory=Icbm152)
    intensity: WhiteMatter | Tissues | None = None
    limits: Limits = field(default_factory=Limits)
    spacing: float | None = 1.5
    interpolator: str = "bSpline"

    def __post_init__(self) -> None:
        if self.spacing is not None and not 0.3 <= self.spacing <= 20:
            raise UserError(f"spacing={self.spacing}: a voxel size between 0.3 and 20 mm is needed")
        if self.brain is None and self.registration is not None and isinstance(self.template, Icbm152):
            raise UserError("registration to ICBM 152 needs brains: choose a brain extraction, or none of both")
        if self.brain is None and self.intensity is not None:
            raise UserError("intensity by tissue needs a brain mask: choose brain extraction, or intensity=none")

    @property
    def space(self) -> str:
        """BIDS label of the result's space; "" for the scan's own."""
        return self.template.name if self.registration else ""

    def parameters(self) -> dict[str, Any]:
        """Every choice by step, as JSON values."""
        return {one.name: _plain(getattr(self, one.name)) for one in fields(self)}

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any], files: bool = False) -> "PreprocessingSteps":
        """The inverse of `parameters`; `files` allows a template that is a file.

        Raises:
            UserError: they are not those of a pipeline, or need such a file.
        """
        try:
            pipeline = cls(**{name: _step(value) for name, value in parameters.items()})
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"the recorded parameters of preprocessing are damaged ({error})") from error
        if isinstance(pipeline.template, TemplateFile) and not files:
            raise UserError(
                f"the training scans were registered to a template of their own, {Path(pipeline.template.path).name}, "
                "which does not come with the model: run `ldae preprocess` with it first"
            )
        return pipeline

    @property
    def summary(self) -> str:
        """The steps in a few words."""
        steps = [type(step).__name__ for step in (self.bias, self.brain) if step]
        if self.registration:
            steps.append(f"{self.registration.transform} to {self.template.name}")
        steps += [f"{self.spacing:g} mm"] if self.spacing else []
        return ", ".join([*steps, *([type(self.intensity).__name__] if self.intensity else [])])

    def key(self) -> str:
        """A hash of every parameter, and of nothing else."""
        text = json.dumps([VERSION, self.parameters()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def grid(self, scan: Volume) -> Volume:
        """Where `scan` comes to lie."""
        if self.registration:
            return template_at_spacing(self.template, self.spacing or float(self.template.volume().spacing.min()))
        return resample(scan, self.spacing)

    def __call__(self, source: Source, folder: Path) -> PreprocessedScan:
        """Prepare a scan, a path or an image; `folder` receives the transforms' files.

        Raises:
            BadScan: the scan, or what came of it, cannot be believed.
        """
        native = Volume.read(source)
        self.limits.check_grid(native)
        notes: list[str] = []
        scan = self.bias(native) if self.bias else native
        mask = self._mask(native, scan, notes)
        measures = (
            {} if mask is None else {"head_mm3": measure_volume(mask, scan), "noise": estimate_noise(native, mask)}
        )
        if mask is not None:
            self.limits.check_brain(measures["head_mm3"])
        if self.intensity:
            scan = scan.with_data(self.intensity(scan.data, mask))
        grid, transforms = self.grid(scan), None
        if self.registration:
            brain = scan if mask is None else scan.with_data(scan.data * mask)
            fixed = template_at_spacing(self.template, self.registration.spacing)
            transforms = self.registration(brain, fixed, folder)
        head = self._move(scan, grid, transforms, self.interpolator)
        head = head.with_data(np.maximum(head.data, 0))  # splines swing below the darkest voxel
        moved = None
        if mask is not None:
            moved = self._move(scan.with_data(mask), grid, transforms, "linear").data >= 0.5
        result = head if moved is None else head.with_data(head.data * moved)
        if self.registration:
            measures["template_correlation"] = correlate_with_template(result, grid)
            self.limits.check_correlation(measures["template_correlation"], self.registration.transform == "Rigid")
        return PreprocessedScan(result, head, moved, native, mask, scan, transforms, measures, notes)

    def _mask(self, native: Volume, scan: Volume, notes: list[str]) -> np.ndarray | None:
        if self.brain is None:
            return None
        if not isinstance(self.brain, Stripped) and is_skull_stripped(native):
            notes.append("already skull-stripped: its own background was taken for the mask")
            return Stripped()(native)
        return self.brain(native if isinstance(self.brain, Stripped) else scan)

    def _move(self, volume: Volume, grid: Volume, transforms: Transforms | None, interpolator: str) -> Volume:
        return transforms.to_template(volume, grid, interpolator) if transforms else resample(volume, self.spacing)


STEPS = {
    step.__name__: step
    for step in (N4, DeepBet, Stripped, Registration, Icbm152, TemplateFile, WhiteMatter, Tissues, Limits)
}


def _step(value: Any) -> Any:
    """The inverse of `_plain`."""
    if not isinstance(value, Mapping):
        return value
    arguments = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items() if key != "step"}
    return STEPS[value["step"]](**arguments)


def _plain(value: Any) -> Any:
    """A step as its class and its fields."""
    if is_dataclass(value):
        return {"step": type(value).__name__, **json.loads(json.dumps(asdict(value), default=list))}
    return value
