"""Scans and the model's volumes in each other's space: NIfTI in, NIfTI out, on the scan's own grid and intensities.

scan = open_scan("sub-01_T1w.nii.gz", transform)
scan.volume                             (1, 1, X, Y, Z) in [0, 1], what the model sees
scan.restored(volume)                   a volume of the model as a NIfTI that overlays on the scan
scan.edited(volume, reconstruction)     the scan + what changed between two volumes: its detail and its skull stay
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from ldae.data.nifti import BadScan, nifti_like
from ldae.data.transforms import ModelSpaceScan, Source, Transform
from ldae.scans.ood_check import OodCheck
from ldae.scans.raw_scan import PreprocessedImage

log = logging.getLogger(__name__)

PreprocessScan = Callable[[Source], PreprocessedImage]
UNLIKE = "unlike the scans that this model was trained on"


@dataclass(frozen=True)
class Scan:
    """One scan as a model sees it, and the way back.

    Attributes:
        image: the scan itself.
        prepared: its volume in model space and its intensity range.
        name: of its file, without folder and ending.
        back: (1, X, Y, Z) of model space -> the grid of `image`; linear, 0 outside the model's field of view.
        gain: the scan's intensities over those that the model saw, where it was preprocessed first.
    """

    image: nib.spatialimages.SpatialImage
    prepared: ModelSpaceScan
    name: str
    back: Callable[[np.ndarray], np.ndarray]
    gain: np.ndarray | float = 1.0

    @property
    def volume(self) -> Tensor:
        """(1, 1, X, Y, Z) float32 in [0, 1]."""
        return torch.from_numpy(self.prepared.volume)[None]

    def restored(self, volume: Tensor) -> nib.Nifti1Image:
        """`volume` (1, 1, X, Y, Z) or fewer axes, in [0, 1], on the scan's grid and in its range of intensities.

        Outside the model's field of view lies the intensity that is 0 in model space.
        """
        low, high = self.prepared.low, self.prepared.high
        return nifti_like((self.back(self._array(volume)) * (high - low) + low) * self.gain, self.image)

    def edited(self, volume: Tensor, reconstruction: Tensor) -> nib.Nifti1Image:
        """The scan plus the change from `reconstruction` to `volume`, both like `volume` above.

        Equal volumes give the scan back, voxel by voxel.
        """
        change = self.back(self._array(volume) - self._array(reconstruction))
        original = np.asarray(self.image.dataobj, dtype=np.float32).reshape(change.shape)
        return nifti_like(original + change * (self.prepared.high - self.prepared.low) * self.gain, self.image)

    def _array(self, volume: Tensor) -> np.ndarray:
        values = torch.as_tensor(volume).detach().float().cpu().numpy()
        return values.reshape(1, *values.shape[-3:])


def open_scan(
    source: Source,
    transform: Transform,
    likeness: OodCheck | None = None,
    preprocess: PreprocessScan | None = None,
    always: bool = False,
) -> Scan:
    """Read a scan for a model.

    Args:
        likeness: what the training scans look like; None takes any scan.
        preprocess: for scans unlike those: makes them alike, as the training scans were made.
        always: preprocess scans that are like those, too.

    Raises:
        BadScan: it cannot be read, or is unlike the training scans and cannot be made alike.
    """
    path = _path(source)
    prepared = transform.to_model_space(source)
    image = nib.load(source) if path is not None else source
    why = None if likeness is None else likeness.reason_rejected(torch.from_numpy(prepared.volume))
    if preprocess is None or (why is None and not always):
        if why is not None:
            raise BadScan(f"{UNLIKE}: {why}; a raw head needs --preprocess, or `ldae preprocess` first", path)
        return Scan(image, prepared, scan_name(source), prepared.to_scan_grid)
    reason = f"{UNLIKE}: {why}; " if why else ""
    if why is not None:
        log.warning("%s: %s: %s", scan_name(source), UNLIKE, why)
    try:
        made = preprocess(source)
        prepared = transform.to_model_space(made.image)
    except BadScan as error:
        raise BadScan(f"{reason}{error.reason}", path) from error
    still = None if likeness is None else likeness.reason_rejected(torch.from_numpy(prepared.volume))
    if still is not None:
        raise BadScan(f"{UNLIKE}, even after preprocessing {made.how}: {still}", path)
    inner = prepared.to_scan_grid
    return Scan(image, prepared, scan_name(source), lambda volume: made.back(inner(volume)), made.gain)


def write_image(image: nib.Nifti1Image, path: Path) -> None:
    """Save a NIfTI atomically."""
    from ldae.utils.files import replacing

    with replacing(path) as temporary:
        nib.save(image, temporary)


def nifti_in_model_space(
    volume: Tensor, transform: Transform, affine: Sequence[Sequence[float]] | None = None
) -> nib.Nifti1Image:
    """A volume that belongs to no scan, (1, X, Y, Z), in the model's own axes.

    Args:
        affine: voxel to mm, 4x4, of the training scans' common grid in model space: the volume overlays on them.
            Without it the origin lies in the middle, and voxels measure 1 mm where the transform leaves them as they
            are.
    """
    values = volume.detach().float().cpu().numpy()[0]
    matrix = _centred(values.shape, transform) if affine is None else np.asarray(affine, dtype=np.float64)
    image = nib.Nifti1Image(values.astype(np.float32), matrix)
    image.header.set_xyzt_units("mm")
    return image


def _centred(shape: Sequence[int], transform: Transform) -> np.ndarray:
    axes = nib.orientations.axcodes2ornt(transform.orientation)
    spacing = np.asarray(transform.spacing or (1.0, 1.0, 1.0))
    affine = np.eye(4)
    affine[:3, :3] = 0
    for place, (axis, sign) in enumerate(axes):
        affine[int(axis), place] = sign * spacing[place]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def reorient_to_ras(volume: np.ndarray, orientation: str) -> np.ndarray:
    """An array (X, Y, Z) of these axes in RAS, as pictures want it."""
    return nib.orientations.apply_orientation(volume, nib.orientations.axcodes2ornt(orientation))


def scan_name(source: Source) -> str:
    """A scan's name without folder and ending; "scan" for an image that has no file."""
    path = _path(source)
    if path is None:
        path = source.get_filename()
    return "scan" if path is None else Path(path).name.removesuffix(".gz").rsplit(".", 1)[0]


def _path(source: Source) -> str | Path | None:
    return source if isinstance(source, str | Path) else None
