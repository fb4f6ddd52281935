"""The orientation of an image file: whether it states one, and whether its sform and qform agree.

The sform is used if its code is not 0, and otherwise the qform. Analyze files, NIfTI files without codes and MGH files
without the flag state no orientation: left and right are unknown unless an orientation is assumed explicitly.
"""

import nibabel as nib
import numpy as np
from nibabel.analyze import AnalyzeImage
from nibabel.freesurfer import MGHImage
from nibabel.spatialimages import HeaderDataError, SpatialImage

from ldae.utils.errors import UserError

# Directions in which the voxel numbers increase, by name: signs of the diagonal of the affine.
ORIENTATIONS = {"RAS": (1.0, 1.0, 1.0), "LAS": (-1.0, 1.0, 1.0)}
UNKNOWN = "left and right are unknown; if you know them, give --orientation RAS or LAS"
TURNED_DEGREES = 45.0  # angle between sform and qform from which they contradict each other
MGH_FLAG_AT = 28  # byte of goodRASFlag in an MGH header, a big-endian int16

# nibabel refuses a quaternion whose norm exceeds 1 by more than float32 rounds once. Files of other programs exceed it
# by more, and the matrix is normalised in any case.
QUATERNION_TOLERANCE = 1e-3
for _header in (nib.Nifti1Header, nib.Nifti2Header):
    _header.quaternion_threshold = -QUATERNION_TOLERANCE


def check_orientation(orientation: str | None) -> str | None:
    """Return an orientation that may be assumed, or None.

    Raises:
        UserError: it is not one of ORIENTATIONS.
    """
    if orientation is not None and orientation not in ORIENTATIONS:
        raise UserError(f"orientation {orientation!r}: choose {' or '.join(ORIENTATIONS)}, for files that state none")
    return orientation


def reason_unoriented(image: SpatialImage) -> str | None:
    """Reason why the file of an image states no orientation, or None if it states one."""
    codes = [int(image.header[name]) for name in ("sform_code", "qform_code") if name in image.header]
    if codes:
        return None if any(codes) else f"it has no affine (sform_code and qform_code are 0): {UNKNOWN}"
    if isinstance(image, AnalyzeImage) and not _has_mat_file(image):
        return f"it has no affine (the Analyze format has none): {UNKNOWN}"
    if isinstance(image, MGHImage) and not _has_mgh_flag(image):
        return f"it has no affine (goodRASFlag is 0): {UNKNOWN}"
    return None


def assume_orientation(image: SpatialImage, orientation: str) -> nib.Nifti1Image:
    """The image with an affine of a given orientation and its own voxel sizes; the middle of the volume is at 0 mm."""
    spacing = np.array([float(size) for size in image.header.get_zooms()[:3]])
    affine = np.diag([*(spacing * ORIENTATIONS[orientation]), 1.0])
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(image.shape[:3]) - 1) / 2)
    return nib.Nifti1Image(image.dataobj, affine)


def compare_forms(image: SpatialImage) -> str | None:
    """Remark on a qform that contradicts the sform; None if they agree or if only one of them is stated."""
    header = image.header
    if not isinstance(header, nib.Nifti1Header) or not (header["sform_code"] > 0 and header["qform_code"] > 0):
        return None
    try:
        sform, qform = (_rotation(form[:3, :3]) for form in (header.get_sform(), header.get_qform()))
    except (ValueError, HeaderDataError, np.linalg.LinAlgError):
        return "its qform is damaged: the sform was used"
    if np.linalg.det(sform) * np.linalg.det(qform) < 0:
        return "its qform is mirrored against its sform, so that left and right differ: the sform was used"
    degrees = np.degrees(np.arccos(np.clip((np.trace(sform.T @ qform) - 1) / 2, -1, 1)))
    if degrees > TURNED_DEGREES:
        return f"its qform is turned by {degrees:.0f} degrees against its sform: the sform was used"
    return None


def _rotation(matrix: np.ndarray) -> np.ndarray:
    """The orthogonal matrix closest to a matrix (3, 3) without its voxel sizes."""
    u, _, v = np.linalg.svd(matrix / np.linalg.norm(matrix, axis=0))
    return u @ v


def _has_mat_file(image: AnalyzeImage) -> bool:
    """Whether SPM's .mat file is beside an Analyze file; it contains the affine."""
    holder = image.file_map.get("mat")
    if holder is None or holder.filename is None:
        return False
    try:
        with holder.get_prepare_fileobj() as file:
            return bool(file.read(1))
    except OSError:
        return False


def _has_mgh_flag(image: MGHImage) -> bool:
    """Whether the header in the file states an affine; nibabel replaces a missing one by its default."""
    holder = image.file_map["image"]
    if holder.filename is None:
        return True
    with holder.get_prepare_fileobj() as file:
        return file.read(MGH_FLAG_AT + 2)[MGH_FLAG_AT:] != b"\0\0"
