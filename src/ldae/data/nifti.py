"""Read one scan from a NIfTI file, and write volumes on its grid.

The header is checked before the voxels are read, and the voxels before they are used.
"""

import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from ldae.utils.errors import UserError

MAX_VOXELS = 2**28  # a head at 0.4 mm has 2**27; a header that states more is damaged
MIN_SIZE = 2
VOXEL_MM = (1e-2, 1e2)  # smallest and largest voxel size

# What nibabel and zlib raise for truncated, foreign and damaged files.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    ArithmeticError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    struct.error,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)


class BadScan(UserError):
    """A scan cannot be used. `reason` says why without the name of the file."""

    def __init__(self, reason: str, path: Path | str | None = None) -> None:
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason


def load_scan(
    source: str | Path | nib.spatialimages.SpatialImage, reject_constant: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) float32 in the axes of the file, and the affine from voxels to mm (RAS+), (4, 4) float64.

    Args:
        reject_constant: whether a volume whose voxels are all equal is rejected.

    Raises:
        BadScan: it cannot be read, is not a single 3-D volume, has no usable affine, has non-finite voxels, or is
            constant.
    """
    path = source if isinstance(source, str | Path) else None
    try:
        image = source if path is None else nib.load(path)
        if not isinstance(image, nib.spatialimages.SpatialImage):
            raise BadScan(f"not a volume but {type(image).__name__}")
        shape = _check_header(image)
        # Large scaled integers overflow to infinity in float32, which is rejected below.
        with np.errstate(over="ignore", invalid="ignore"):
            data = np.asarray(image.dataobj).astype(np.float32).reshape(shape)
        affine = np.asarray(image.affine, dtype=np.float64)
    except BadScan as error:
        raise BadScan(error.reason, path) from None
    except _UNREADABLE as error:
        # The reason is written to tables, but nibabel's names the file with its whole path.
        line = _first_line(error) if path is None else _first_line(error).replace(str(path), Path(path).name)
        what = "no such file" if isinstance(error, FileNotFoundError) else f"unreadable ({line})"
        raise BadScan(what, path) from error
    if not np.isfinite(data).all():
        raise BadScan("it has NaN or infinite voxels", path)
    if reject_constant and data.min() == data.max():
        raise BadScan("all voxels are zero" if not data.any() else "all voxels are equal", path)
    return data, affine


def nifti_like(data: np.ndarray, image: nib.spatialimages.SpatialImage) -> nib.Nifti1Image:
    """A float32 NIfTI with the voxels `data` and the shape, affine and orientation codes of `image`."""
    header = image.header if isinstance(image, nib.Nifti1Image) else None
    result = nib.Nifti1Image(data.astype(np.float32).reshape(image.shape), image.affine, header)
    result.set_data_dtype(np.float32)
    result.header.set_slope_inter(1, 0)
    result.header["cal_min"] = result.header["cal_max"] = 0
    return result


def _check_header(image: nib.spatialimages.SpatialImage) -> tuple[int, int, int]:
    """The shape of the volume, from the header alone."""
    shape = tuple(int(size) for size in image.shape)
    if len(shape) < 3 or any(size != 1 for size in shape[3:]) or min(shape) < 1:
        raise BadScan(f"not one 3-D volume: shape {list(shape)}")
    if min(shape[:3]) < MIN_SIZE:
        raise BadScan(f"not a volume: shape {list(shape)}")
    if np.prod([float(size) for size in shape]) > MAX_VOXELS:
        raise BadScan(f"its header states {list(shape)} voxels, more than {MAX_VOXELS}")
    if np.dtype(image.get_data_dtype()).kind not in "iufb":
        raise BadScan(f"its voxels are not real numbers but {image.get_data_dtype()}")
    _check_affine(image)
    return shape[0], shape[1], shape[2]


def _check_affine(image: nib.spatialimages.SpatialImage) -> None:
    codes = [int(image.header[name]) for name in ("sform_code", "qform_code") if name in image.header]
    if codes and not any(codes):
        raise BadScan("it has no affine (sform_code and qform_code are 0): left and right are unknown")
    if image.affine is None or not np.isfinite(image.affine).all():
        raise BadScan("it has no finite affine")
    sizes = nib.affines.voxel_sizes(image.affine)
    if not (VOXEL_MM[0] <= sizes.min() and sizes.max() <= VOXEL_MM[1]):
        raise BadScan(f"its voxels measure {[float(f'{size:.3g}') for size in sizes]} mm")
    # 1 for perpendicular axes; near 0 if two axes are parallel.
    if abs(np.linalg.det(image.affine[:3, :3] / sizes)) < 1e-2:
        raise BadScan("its affine is degenerate")


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()
    return (text[0] if text else type(error).__name__)[:400]
