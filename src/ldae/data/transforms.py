"""The one transform of all stages: a NIfTI to a volume in model space, built on MONAI.

orientation -> spacing -> crop -> intensity in [0, 1] -> pad. Model space is (1, X, Y, Z) with x from left to right in
RAS. The way back, `inverse`, is computed from the original image: nothing is stored beside a volume.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import nibabel as nib
import numpy as np
import torch

from ldae.data.nifti import BadScan, load_scan, nifti_like
from ldae.utils.errors import UserError

VERSION = 1  # of the arithmetic: raise it when the same parameters give other voxels, so that caches are made anew
AXIS_CODES = (("L", "R"), ("P", "A"), ("I", "S"))
SPACING_TOLERANCE = 1e-4  # relative difference of voxel sizes below which voxels are left alone
MAX_VOXELS = 2**28  # of a resampled volume: a wrong voxel size must not take the machine's memory

Source = str | Path | nib.spatialimages.SpatialImage


class Intensity(Protocol):
    """Chooses the intensities that become 0 and 1."""

    def limits(self, native: np.ndarray, cropped: np.ndarray) -> tuple[float, float]:
        """From the scan's own voxels, and from those on the model's grid."""
        ...


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of the nonzero voxels of the scan's own grid, where background is still exactly zero; clipped."""

    low: float = 0.5
    high: float = 99.5

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 100:
            raise UserError(f"intensity percentiles {self.low}, {self.high}: 0 <= low < high <= 100 is needed")

    def limits(self, native: np.ndarray, cropped: np.ndarray) -> tuple[float, float]:
        """See Intensity."""
        low, high = np.percentile(native[native != 0], (self.low, self.high))
        return float(low), float(high)


@dataclass(frozen=True)
class MinMax:
    """Smallest and largest voxel of the resampled and cropped scan, as published."""

    def limits(self, native: np.ndarray, cropped: np.ndarray) -> tuple[float, float]:
        """See Intensity."""
        return float(cropped.min()), float(cropped.max())


@dataclass(frozen=True)
class ModelSpaceScan:
    """A scan in model space, and what it takes to read it there."""

    volume: np.ndarray  # (1, X, Y, Z) float32 in [0, 1]
    affine: np.ndarray  # voxel to mm, 4x4, of model space
    low: float  # the scan's intensity that became 0
    high: float  # and 1
    to_scan_grid: Callable[
        [np.ndarray], np.ndarray
    ]  # (1, X, Y, Z) -> the scan's own grid (I, J, K); linear, 0 where unseen


class Transform:
    """Brings scans to model space.

    Args:
        shape: voxels along x, y, z; what lies outside is cropped, what is missing is 0.
        spacing: voxel size in mm, one or three; None leaves it as it is.
        intensity: what becomes 0 and 1; robust percentiles by default.
        orientation: axes of model space, e.g. RAS, or LAS for the released weights.

    Raises:
        UserError: parameters without meaning.
    """

    def __init__(
        self,
        shape: Sequence[int],
        spacing: float | Sequence[float] | None = None,
        intensity: Intensity | None = None,
        orientation: str = "RAS",
    ) -> None:
        self.shape = tuple(int(size) for size in shape)
        self.spacing = None if spacing is None else _triple(spacing)
        self.intensity = intensity or Percentiles()
        self.orientation = str(orientation)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise UserError(f"data.shape={list(self.shape)}: three positive sizes are needed")
        if sorted(next((i for i, p in enumerate(AXIS_CODES) if c in p), -1) for c in self.orientation) != [0, 1, 2]:
            raise UserError(f"transform.orientation={self.orientation}: three letters such as RAS or LAS are needed")

    def __call__(self, source: Source) -> np.ndarray:
        """A scan in model space, (1, X, Y, Z) float32 in [0, 1].

        Raises:
            BadScan: its content cannot be used.
        """
        return self.to_model_space(source).volume

    def to_model_space(self, source: Source) -> ModelSpaceScan:
        """The same, with model space's affine and the intensity range."""
        data, affine = load_scan(source)
        path = source if isinstance(source, str | Path) else None
        try:
            volume, steps = self._geometry(data, affine, mode="bilinear")
        except BadScan as error:
            raise BadScan(error.reason, path) from None
        low, high = self.intensity.limits(data, volume.numpy())
        if not high > low:
            raise BadScan(f"its intensity range is empty ({low:g} to {high:g})", path)
        padded = self._pad((volume - low).div_(high - low).clamp_(0, 1), steps)
        return ModelSpaceScan(padded.numpy(), padded.affine.numpy(), low, high, partial(_back, padded, steps))

    def labels(self, source: Source) -> np.ndarray:
        """A label map brought to model space by nearest neighbour, (X, Y, Z) int32."""
        data, affine = load_scan(source, reject_constant=False)
        volume, steps = self._geometry(data, affine, mode="nearest")
        return self._pad(volume, steps)[0].round().to(torch.int32).numpy()

    def fraction(self, source: Source, labels: Sequence[int]) -> np.ndarray:
        """Share of each model-space voxel that belongs to `labels` of a label map, (X, Y, Z) float32 in [0, 1].

        Sums of it are volumes, far truer than counted voxels where the model's are large.
        """
        data, affine = load_scan(source, reject_constant=False)
        volume, steps = self._geometry(np.isin(data.round(), list(labels)).astype(np.float32), affine, mode="bilinear")
        return self._pad(volume, steps)[0].clamp(0, 1).numpy()

    def inverse(self, volume: np.ndarray | torch.Tensor, original: Source) -> nib.Nifti1Image:
        """A model-space volume on the grid and in the intensity range of the scan it came from.

        Voxels outside the model's field of view get the intensity that is 0 in model space.

        Args:
            volume: (1, X, Y, Z) or (X, Y, Z), in [0, 1].
            original: the scan whose grid and range are wanted.
        """
        volume = np.asarray(volume, dtype=np.float32).reshape(1, *np.shape(volume)[-3:])
        prepared = self.to_model_space(original)
        image = nib.load(original) if isinstance(original, str | Path) else original
        return nifti_like(prepared.to_scan_grid(volume) * (prepared.high - prepared.low) + prepared.low, image)

    def key(self) -> str:
        """A hash of every parameter: volumes with the same key are comparable voxel by voxel."""
        intensity = {"kind": type(self.intensity).__qualname__, **asdict(self.intensity)}
        about = [VERSION, self.orientation, self.spacing, self.shape, intensity]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

    def _geometry(self, data: np.ndarray, affine: np.ndarray, mode: str) -> tuple[Any, list[Any]]:
        """Orientation, spacing and crop: a MetaTensor (1, ...), and the MONAI transforms that were applied."""
        from monai.data import MetaTensor
        from monai.transforms import Spacing

        volume = self._orient(MetaTensor(torch.from_numpy(data)[None], affine=torch.from_numpy(affine)))
        steps = [self._orient]
        size = nib.affines.voxel_sizes(volume.affine.numpy())
        factor = np.divide(self.spacing or size, size)
        if np.abs(factor - 1).max() > SPACING_TOLERANCE:
            if np.prod(np.maximum(volume.shape[1:] / factor, 1)) > MAX_VOXELS:
                raise BadScan(f"voxels of {size.round(3).tolist()} mm in a {list(data.shape)} grid cannot be right")
            if mode != "nearest":
                blurred = torch.from_numpy(blur_before_downsampling(volume.numpy(), factor))
                volume = MetaTensor(blurred, meta=volume.meta, applied_operations=volume.applied_operations)
            spacing = Spacing(self.spacing, mode=mode, padding_mode="border", dtype=np.float32)
            volume = spacing(volume)
            steps.append(spacing)
        return self._crop(volume), [*steps, self._crop]

    def _pad(self, volume: Any, steps: list[Any]) -> Any:
        steps.append(self._padding)
        return self._padding(volume)

    # MONAI takes seconds to import; and an inverse must be asked of the very object that went forward.
    @cached_property
    def _orient(self) -> Any:
        from monai.transforms import Orientation

        return Orientation(self.orientation, labels=AXIS_CODES)

    @cached_property
    def _crop(self) -> Any:
        from monai.transforms import CenterSpatialCrop

        return CenterSpatialCrop(self.shape)

    @cached_property
    def _padding(self) -> Any:
        from monai.transforms import SpatialPad

        return SpatialPad(self.shape, mode="constant", value=0)


def _back(padded: Any, steps: Sequence[Any], volume: np.ndarray) -> np.ndarray:
    """A model-space volume (1, X, Y, Z) through the inverses of the steps that `padded` went through."""
    from monai.data import MetaTensor

    if volume.shape != tuple(padded.shape):
        raise ValueError(f"volume {volume.shape[1:]} is not in model space {tuple(padded.shape[1:])}")
    # The inverses consume the record of what was applied, and move the affine.
    record = {"meta": padded.meta, "applied_operations": padded.applied_operations}
    result = MetaTensor(torch.from_numpy(volume), **copy.deepcopy(record))
    for step in reversed(steps):
        result = step.inverse(result)
    return result[0].numpy()


def _triple(spacing: float | Sequence[float]) -> tuple[float, float, float]:
    values = [float(spacing)] * 3 if isinstance(spacing, int | float) else [float(value) for value in spacing]
    if len(values) != 3 or not all(math.isfinite(value) and value > 0 for value in values):
        raise UserError(f"data.spacing={spacing}: one or three positive voxel sizes in mm are needed")
    return values[0], values[1], values[2]


def blur_before_downsampling(volume: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Blur the axes that lose voxels, (1, X, Y, Z).

    MONAI's Spacing interpolates between neighbours only: at 1 mm to 4.5 mm it would skip most voxels and alias. The
    Gaussian widens the point spread function from the old voxel's to the new one's (Cardoso et al., MICCAI 2015,
    doi 10.1007/978-3-319-24571-3_81).
    """
    from scipy.ndimage import gaussian_filter1d

    for axis, ratio in enumerate(factor, start=1):
        if ratio > 1 + SPACING_TOLERANCE:
            sigma = math.sqrt(ratio**2 - 1) / (2 * math.sqrt(2 * math.log(2)))
            volume = gaussian_filter1d(volume, sigma, axis=axis, mode="nearest", truncate=3)
    return np.ascontiguousarray(volume)
