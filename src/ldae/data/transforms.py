"""The transform from a NIfTI scan to a volume in model space, which all stages share, and its inverse; built on MONAI.

orientation -> voxel size -> crop -> intensity in [0, 1] -> pad. Volumes are (1, X, Y, Z); in RAS, x runs from left to
right. The inverse is computed from the original scan, so that nothing has to be stored with a volume.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import nibabel as nib
import numpy as np
import torch

from ldae.data.nifti import BadScan, Source, load_image, load_label_map, load_scan, nifti_like
from ldae.data.scan_orientation import check_orientation
from ldae.utils.errors import UserError

if TYPE_CHECKING:
    from monai.data import MetaTensor
    from monai.transforms import CenterSpatialCrop, InvertibleTransform, Orientation, SpatialPad

VERSION = 1  # to be raised when the same parameters give other voxels, so that caches are not reused
AXIS_CODES = (("L", "R"), ("P", "A"), ("I", "S"))
SPACING_TOLERANCE = 1e-4  # relative difference of voxel sizes below which a scan is not resampled
MAX_VOXELS = 2**28  # of a resampled volume; a wrong voxel size in a header would need any amount of memory


class Intensity(Protocol):
    """Chooses the intensities of a scan that become 0 and 1."""

    def limits(self, native: np.ndarray, cropped: np.ndarray) -> tuple[float, float]:
        """The two intensities, from the voxels of the scan and from those of the resampled and cropped volume."""
        ...


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of the nonzero voxels of the scan before resampling, while background is exactly zero."""

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
    """The smallest and the largest voxel of the resampled and cropped volume, as published."""

    def limits(self, native: np.ndarray, cropped: np.ndarray) -> tuple[float, float]:
        """See Intensity."""
        return float(cropped.min()), float(cropped.max())


@dataclass(frozen=True)
class ModelSpaceScan:
    """A scan in model space, and the way back to its own grid and intensities.

    Attributes:
        volume: (1, X, Y, Z) float32 in [0, 1].
        affine: (4, 4), from voxels of the volume to mm.
        low: intensity of the scan that became 0.
        high: intensity of the scan that became 1.
        to_scan_grid: linear map from a volume (1, X, Y, Z) to the grid of the scan (I, J, K), with 0 outside the
            model's field of view.
        notes: remarks on what is unusual in the scan's file, or was changed when it was read.
    """

    volume: np.ndarray
    affine: np.ndarray
    low: float
    high: float
    to_scan_grid: Callable[[np.ndarray], np.ndarray]
    notes: tuple[str, ...] = ()


class Transform:
    """Brings scans to model space.

    Args:
        shape: voxels along x, y and z. Larger scans are cropped and smaller ones are padded with 0, on both sides.
        spacing: voxel size in mm, one number or three; None keeps that of the scan.
        intensity: chooses the intensities that become 0 and 1; by default percentiles, which are robust to outliers.
        orientation: axes of model space, such as RAS, or LAS for the released weights.
        assume_orientation: RAS or LAS, the axes of scans whose files state none; None rejects such scans.

    Raises:
        UserError: a parameter is out of range.
    """

    channels = 1

    def __init__(
        self,
        shape: Sequence[int],
        spacing: float | Sequence[float] | None = None,
        intensity: Intensity | None = None,
        orientation: str = "RAS",
        assume_orientation: str | None = None,
    ) -> None:
        self.shape = tuple(int(size) for size in shape)
        self.spacing = None if spacing is None else _triple(spacing)
        self.intensity = intensity or Percentiles()
        self.orientation = str(orientation)
        self.assume_orientation = check_orientation(assume_orientation)
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise UserError(f"data.shape={list(self.shape)}: three positive sizes are needed")
        if sorted(next((i for i, p in enumerate(AXIS_CODES) if c in p), -1) for c in self.orientation) != [0, 1, 2]:
            raise UserError(f"transform.orientation={self.orientation}: three letters such as RAS or LAS are needed")

    def assuming(self, orientation: str | None) -> "Transform":
        """The same transform, for scans with this orientation if their files state none."""
        if orientation == self.assume_orientation:
            return self
        return Transform(self.shape, self.spacing, self.intensity, self.orientation, orientation)

    def __call__(self, source: Source) -> np.ndarray:
        """A scan in model space, (1, X, Y, Z) float32 in [0, 1].

        Raises:
            BadScan: it cannot be used.
        """
        return self.to_model_space(source).volume

    def to_model_space(self, source: Source) -> ModelSpaceScan:
        """The same with the affine, the intensity range and the way back.

        Raises:
            BadScan: it cannot be used.
        """
        scan = load_scan(source, self.assume_orientation)
        path = source if isinstance(source, str | Path) else None
        try:
            volume, steps = self._geometry(scan.data[None], scan.affine, mode="bilinear")
        except BadScan as error:
            raise BadScan(error.reason, path) from None
        low, high = self.intensity.limits(scan.data, volume.numpy())
        if not high > low:
            raise BadScan(f"its intensity range is empty ({low:g} to {high:g})", path)
        padded = self._pad((volume - low).div_(high - low).clamp_(0, 1), steps)
        # The intensities of the file are those of `scan` plus its offset.
        low, high, to_scan_grid = low + scan.offset, high + scan.offset, partial(_invert, padded, steps)
        return ModelSpaceScan(padded.numpy(), padded.affine.numpy(), low, high, to_scan_grid, scan.notes)

    def labels(self, source: Source) -> np.ndarray:
        """A label map in model space by nearest-neighbour interpolation, (X, Y, Z) int32."""
        labels = load_label_map(source, self.assume_orientation)
        volume, steps = self._geometry(labels.data[None], labels.affine, mode="nearest")
        return self._pad(volume, steps)[0].round().to(torch.int32).numpy()

    def fraction(self, source: Source, labels: Sequence[int]) -> np.ndarray:
        """Fraction of each model-space voxel that belongs to `labels` of a label map, (X, Y, Z) float32 in [0, 1].

        If voxels are large, the sum of these fractions is a far better estimate of a volume than a count of voxels.
        """
        found = load_label_map(source, self.assume_orientation)
        region = np.isin(found.data.round(), list(labels)).astype(np.float32)
        volume, steps = self._geometry(region[None], found.affine, mode="bilinear")
        return self._pad(volume, steps)[0].clamp(0, 1).numpy()

    def maps(self, values: np.ndarray, affine: np.ndarray) -> np.ndarray:
        """Maps (C, I, J, K) in [0, 1], on the grid of a scan, in model space: (C, X, Y, Z) float32, 0 outside.

        Args:
            affine: (4, 4), from voxels of the scan to mm.

        Raises:
            BadScan: the affine cannot be right.
        """
        volume, steps = self._geometry(values, affine, mode="bilinear")
        return self._pad(volume.clamp_(0, 1), steps).numpy()

    def inverse(self, volume: np.ndarray | torch.Tensor, original: Source) -> nib.Nifti1Image:
        """A model-space volume on the grid and in the intensity range of a scan.

        Voxels outside the model's field of view get the intensity that is 0 in model space.

        Args:
            volume: (1, X, Y, Z) or (X, Y, Z), in [0, 1].
            original: the scan that the volume belongs to.
        """
        volume = np.asarray(volume, dtype=np.float32).reshape(1, *np.shape(volume)[-3:])
        prepared = self.to_model_space(original)
        image = load_image(original, self.assume_orientation)
        return nifti_like(prepared.to_scan_grid(volume) * (prepared.high - prepared.low) + prepared.low, image)

    def key(self) -> str:
        """A hash of all parameters. Volumes with the same key are comparable voxel by voxel."""
        intensity = {"kind": type(self.intensity).__qualname__, **asdict(self.intensity)}
        parameters = [VERSION, self.orientation, self.spacing, self.shape, intensity]
        return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]

    def _geometry(
        self, data: np.ndarray, affine: np.ndarray, mode: str
    ) -> "tuple[MetaTensor, list[InvertibleTransform]]":
        """Orientation, voxel size and crop of (C, ...): the result, and the MONAI transforms that were applied."""
        from monai.data import MetaTensor
        from monai.transforms import Spacing

        volume = self._orient(MetaTensor(torch.from_numpy(data), affine=torch.from_numpy(affine)))
        steps = [self._orient]
        size = nib.affines.voxel_sizes(volume.affine.numpy())
        factor = np.divide(self.spacing or size, size)
        if np.abs(factor - 1).max() > SPACING_TOLERANCE:
            if np.prod(np.maximum(volume.shape[1:] / factor, 1)) > MAX_VOXELS:
                raise BadScan(f"voxels of {size.round(3).tolist()} mm in a {list(data.shape[1:])} grid cannot be right")
            if mode != "nearest":
                blurred = torch.from_numpy(blur_before_downsampling(volume.numpy(), factor))
                volume = MetaTensor(blurred, meta=volume.meta, applied_operations=volume.applied_operations)
            spacing = Spacing(self.spacing, mode=mode, padding_mode="border", dtype=np.float32)
            volume = spacing(volume)
            steps.append(spacing)
        return self._crop(volume), [*steps, self._crop]

    def _pad(self, volume: "MetaTensor", steps: "list[InvertibleTransform]") -> "MetaTensor":
        """Pad to the shape of model space, and add this to `steps`."""
        steps.append(self._padding)
        return self._padding(volume)

    # Built when first used, because MONAI takes seconds to import. They are kept because MONAI inverts a transform only
    # with the object that applied it.
    @cached_property
    def _orient(self) -> "Orientation":
        from monai.transforms import Orientation

        return Orientation(self.orientation, labels=AXIS_CODES)

    @cached_property
    def _crop(self) -> "CenterSpatialCrop":
        from monai.transforms import CenterSpatialCrop

        return CenterSpatialCrop(self.shape)

    @cached_property
    def _padding(self) -> "SpatialPad":
        from monai.transforms import SpatialPad

        return SpatialPad(self.shape, mode="constant", value=0)


def _invert(padded: "MetaTensor", steps: "Sequence[InvertibleTransform]", volume: np.ndarray) -> np.ndarray:
    """Apply the inverses of `steps`, whose result is `padded`, to a model-space volume (1, X, Y, Z)."""
    from monai.data import MetaTensor

    if volume.shape != tuple(padded.shape):
        raise ValueError(f"volume {volume.shape[1:]} is not in model space {tuple(padded.shape[1:])}")
    # The inverses remove entries from the record of applied operations and change the affine: they get a copy.
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
    """Blur maps (C, X, Y, Z) along the axes that lose voxels, to avoid aliasing.

    MONAI's Spacing interpolates between neighbours only: from 1 mm to 4.5 mm it would skip most voxels. The Gaussian
    widens the point spread function from that of the old voxel to that of the new one (Cardoso et al., MICCAI 2015,
    doi 10.1007/978-3-319-24571-3_81).

    Args:
        factor: (3,) new voxel size over the old one along each axis.
    """
    from scipy.ndimage import gaussian_filter1d

    for axis, ratio in enumerate(factor, start=1):
        if ratio > 1 + SPACING_TOLERANCE:
            sigma = math.sqrt(ratio**2 - 1) / (2 * math.sqrt(2 * math.log(2)))
            volume = gaussian_filter1d(volume, sigma, axis=axis, mode="nearest", truncate=3)
    return np.ascontiguousarray(volume)
