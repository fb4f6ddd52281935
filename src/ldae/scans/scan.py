"""One scan between its own grid and model space: NIfTI in, NIfTI out.

scan = open_scan("sub-01_T1w.nii.gz", transform)
scan.volume                             (1, 1, X, Y, Z) in [0, 1], the model's input
scan.view                               (1, channels, X, Y, Z) in [0, 1], what the semantic encoder sees of it
scan.restored(volume)                   a volume in model space as a NIfTI that overlays on the scan
scan.edited(volume, reconstruction)     the scan plus the change between two volumes: it keeps its detail and its skull
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from ldae.data.intensities import constant_background
from ldae.data.nifti import BadScan, Source, load_image, nifti_like
from ldae.data.transforms import ModelSpaceScan, Transform
from ldae.data.view import View
from ldae.scans.ood_check import OodCheck
from ldae.scans.raw_scan import PreprocessedImage
from ldae.utils.files import replacing

log = logging.getLogger(__name__)

REJECTED = "rejected by the out-of-distribution check"


@dataclass(frozen=True)
class Scan:
    """A scan in model space, and the way back to its own grid.

    Attributes:
        image: the scan itself.
        prepared: the scan in model space, and its intensity range.
        name: of its file, without folder and ending.
        to_scan_grid: volume (1, X, Y, Z) in model space -> the grid of `image`; linear, 0 outside the field of view.
        gain: ratio of the scan's intensities to those of the preprocessed scan, if it was preprocessed.
        offset: added to the intensities after `gain`; not 0 if it was preprocessed and its background is not 0.
        viewed: what the semantic encoder sees of the scan, (channels, X, Y, Z); None: the volume.
    """

    image: nib.spatialimages.SpatialImage
    prepared: ModelSpaceScan
    name: str
    to_scan_grid: Callable[[np.ndarray], np.ndarray]
    gain: np.ndarray | float = 1.0
    offset: float = 0.0
    viewed: np.ndarray | None = None

    @property
    def volume(self) -> Tensor:
        """(1, 1, X, Y, Z) float32 in [0, 1]."""
        return torch.from_numpy(self.prepared.volume)[None]

    @property
    def view(self) -> Tensor:
        """What the semantic encoder sees of the scan, (1, channels, X, Y, Z) float32 in [0, 1]; see ldae.data.view."""
        return self.volume if self.viewed is None else torch.from_numpy(self.viewed)[None]

    def restored(self, volume: Tensor) -> nib.Nifti1Image:
        """`volume` on the scan's grid and in its intensity range.

        Voxels outside the model's field of view get the intensity that is 0 in model space.

        Args:
            volume: in [0, 1], (X, Y, Z), with or without leading axes of length 1.
        """
        low, high = self.prepared.low, self.prepared.high
        values = (self.to_scan_grid(_one_channel(volume)) * (high - low) + low) * self.gain + self.offset
        return nifti_like(values, self.image)

    def edited(self, volume: Tensor, reconstruction: Tensor) -> nib.Nifti1Image:
        """The scan plus the change from `reconstruction` to `volume`; without a change, the scan voxel by voxel.

        A constant background, as around a brain without skull, is kept, and no voxel becomes darker than the darkest
        of the scan outside of it: a ventricle that grows would otherwise be taken for background.

        Args:
            volume, reconstruction: as in `restored`.
        """
        change = self.to_scan_grid(_one_channel(volume) - _one_channel(reconstruction))
        original = np.asarray(self.image.dataobj, dtype=np.float32).reshape(change.shape)
        edited = original + change * (self.prepared.high - self.prepared.low) * self.gain
        return nifti_like(_keep_background(edited, original), self.image)

    def in_its_intensities(self, difference: Tensor) -> nib.Nifti1Image:
        """A difference of volumes, or its standard deviation, on the scan's grid and in units of its intensities.

        Args:
            difference: as in `restored`.
        """
        values = self.to_scan_grid(_one_channel(difference)) * (self.prepared.high - self.prepared.low) * self.gain
        return nifti_like(values, self.image)


def _keep_background(edited: np.ndarray, original: np.ndarray) -> np.ndarray:
    """Edited intensities (X, Y, Z), those of the original's background unchanged and the others not below it."""
    background = constant_background(original)
    inside = np.isfinite(original) if background is None else np.isfinite(original) & (original != background)
    if not inside.any():
        return edited
    return np.where(inside, np.maximum(edited, original[inside].min()), original)


def _one_channel(volume: Tensor) -> np.ndarray:
    """(1, X, Y, Z) float32 on the CPU."""
    values = torch.as_tensor(volume).detach().float().cpu().numpy()
    return values.reshape(1, *values.shape[-3:])


def open_scan(
    source: Source,
    transform: Transform,
    ood_check: OodCheck | None = None,
    preprocess: Callable[[Source], PreprocessedImage] | None = None,
    always: bool = False,
    view: View | None = None,
) -> Scan:
    """Read a scan and bring it to model space.

    Args:
        ood_check: out-of-distribution check; None accepts any scan.
        preprocess: preprocessing for scans that fail the check; None rejects them.
        always: preprocess scans that pass the check, too.
        view: what the semantic encoder sees of a scan; None: the volume.

    Raises:
        BadScan: it cannot be read, it fails the check and preprocessing does not help, or its view cannot be made.
    """
    path = source if isinstance(source, str | Path) else None
    name, prepared = scan_name(source), transform.to_model_space(source)
    image = load_image(source, transform.assume_orientation)
    reason = _reason_rejected(prepared, ood_check)
    if preprocess is None and reason is not None:
        raise BadScan(f"{REJECTED}: {reason}; for a raw head use --preprocess or run `ldae preprocess` first", path)
    _log_notes(name, prepared.notes)
    if preprocess is None or (reason is None and not always):
        return Scan(image, prepared, name, prepared.to_scan_grid, viewed=_look_at(name, source, transform, view))
    if reason is not None:
        log.warning("%s: %s: %s", name, REJECTED, reason)
    try:
        preprocessed = preprocess(source)
        _log_notes(name, [note for note in preprocessed.notes if note not in prepared.notes])
        prepared = transform.to_model_space(preprocessed.image)
    except BadScan as error:
        raise BadScan(f"{REJECTED}: {reason}; {error.reason}" if reason else error.reason, path) from error
    reason = _reason_rejected(prepared, ood_check)
    if reason is not None:
        raise BadScan(f"{REJECTED}, even after preprocessing {preprocessed.steps}: {reason}", path)
    viewed = _look_at(name, preprocessed.image, transform, view)
    inner = prepared.to_scan_grid
    gain, offset = preprocessed.gain, preprocessed.offset
    return Scan(image, prepared, name, lambda volume: preprocessed.to_scan_grid(inner(volume)), gain, offset, viewed)


def _look_at(name: str, source: Source, transform: Transform, view: View | None) -> np.ndarray | None:
    """The view of a scan; None if it is the volume."""
    if view is None or view.is_volume(transform):
        return None
    seen = view.assuming(transform.assume_orientation).read(source)
    _log_notes(name, seen.notes)
    return seen.values


def _log_notes(name: str, notes: Sequence[str]) -> None:
    for note in notes:
        log.warning("%s: %s", name, note)


def _reason_rejected(prepared: ModelSpaceScan, ood_check: OodCheck | None) -> str | None:
    return None if ood_check is None else ood_check.reason_rejected(torch.from_numpy(prepared.volume))


def write_image(image: nib.Nifti1Image, path: Path) -> None:
    """Write a NIfTI atomically."""
    with replacing(path) as temporary:
        nib.save(image, temporary)


def nifti_in_model_space(
    volume: Tensor, transform: Transform, affine: Sequence[Sequence[float]] | None = None
) -> nib.Nifti1Image:
    """A sampled volume (1, X, Y, Z) as a NIfTI in model space.

    Args:
        affine: voxel to mm, 4x4, of model space on the grid that the training scans share, so that the volume overlays
            on them. None: the origin is the middle of the volume, and voxels measure 1 mm if the transform has no
            voxel size.
    """
    values = volume.detach().float().cpu().numpy()[0]
    matrix = _centred_affine(values.shape, transform) if affine is None else np.asarray(affine, dtype=np.float64)
    image = nib.Nifti1Image(values.astype(np.float32), matrix)
    image.header.set_xyzt_units("mm")
    return image


def _centred_affine(shape: Sequence[int], transform: Transform) -> np.ndarray:
    axes = nib.orientations.axcodes2ornt(transform.orientation)
    spacing = np.asarray(transform.spacing or (1.0, 1.0, 1.0))
    affine = np.eye(4)
    affine[:3, :3] = 0
    for place, (axis, sign) in enumerate(axes):
        affine[int(axis), place] = sign * spacing[place]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def reorient_to_ras(volume: np.ndarray, orientation: str) -> np.ndarray:
    """An array (X, Y, Z) with axes `orientation`, such as LAS, in RAS, for display."""
    return nib.orientations.apply_orientation(volume, nib.orientations.axcodes2ornt(orientation))


def scan_name(source: Source) -> str:
    """A scan's file name without folder and ending; "scan" for an image that has no file."""
    path = source if isinstance(source, str | Path) else source.get_filename()
    return "scan" if path is None else Path(path).name.removesuffix(".gz").rsplit(".", 1)[0]
