"""Reading one scan: its header is judged before its voxels are read, its voxels before they are used; and its like."""

import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np

from ldae.utils.errors import UserError

MAX_VOXELS = 2**28  # a 0.4 mm head is 2**27; a header that asks for more is broken, or hostile
MIN_SIZE = 2
VOXEL_MM = (1e-2, 1e2)

# What nibabel and zlib raise on torn, foreign and nonsensical files.
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
    """A scan whose content cannot be used; the message says why, `reason` without the file's name."""

    def __init__(self, reason: str, path: Path | str | None = None) -> None:
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason


def load_scan(
    source: str | Path | nib.spatialimages.SpatialImage, reject_constant: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) float32 in the file's own axes, and the affine from voxels to mm (RAS+), 4x4 float64.

    Raises:
        BadScan: it cannot be read, is not one 3-D volume, has no usable affine, holds NaN or infinity, or is constant.
    """
    path = source if isinstance(source, str | Path) else None
    try:
        image = source if path is None else nib.load(path)
        if not isinstance(image, nib.spatialimages.SpatialImage):
            raise BadScan(f"not a volume but {type(image).__name__}")
        shape = _check_header(image)
        # Large scaled integers overflow float32: found below as infinity.
        with np.errstate(over="ignore", invalid="ignore"):
            data = np.asarray(image.dataobj).astype(np.float32).reshape(shape)
        affine = np.asarray(image.affine, dtype=np.float64)
    except BadScan as error:
        raise BadScan(error.reason, path) from None
    except _UNREADABLE as error:
        # The reason goes into tables: nibabel's names the file with its whole path.
        line = _first_line(error) if path is None else _first_line(error).replace(str(path), Path(path).name)
        what = "no such file" if isinstance(error, FileNotFoundError) else f"unreadable ({line})"
        raise BadScan(what, path) from error
    if not np.isfinite(data).all():
        raise BadScan("it holds NaN or infinite voxels", path)
    if reject_constant and data.min() == data.max():
        raise BadScan("all voxels are zero" if not data.any() else "all voxels are equal", path)
    return data, affine


def nifti_like(data: np.ndarray, image: nib.spatialimages.SpatialImage) -> nib.Nifti1Image:
    """A float32 NIfTI of other voxels with the shape, affine and orientation codes of `image`."""
    header = image.header if isinstance(image, nib.Nifti1Image) else None
    result = nib.Nifti1Image(data.astype(np.float32).reshape(image.shape), image.affine, header)
    result.set_data_dtype(np.float32)
    result.header.set_slope_inter(1, 0)
    result.header["cal_min"] = result.header["cal_max"] = 0
    return result


def _check_header(image: nib.spatialimages.SpatialImage) -> tuple[int, int, int]:
    """The volume's shape, from the header alone."""
    shape = tuple(int(size) for size in image.shape)
    if len(shape) < 3 or any(size != 1 for size in shape[3:]) or min(shape) < 1:
        raise BadScan(f"not one 3-D volume: shape {list(shape)}")
    if min(shape[:3]) < MIN_SIZE:
        raise BadScan(f"not a volume: shape {list(shape)}")
    if np.prod([float(size) for size in shape]) > MAX_VOXELS:
        raise BadScan(f"its header asks for {list(shape)} voxels, more than {MAX_VOXELS}")
    if np.dtype(image.get_data_dtype()).kind not in "iufb":
        raise BadScan(f"its voxels are no real numbers but {image.get_data_dtype()}")
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
    # 1 for a box; near 0, two axes run the same way.
    if abs(np.linalg.det(image.affine[:3, :3] / sizes)) < 1e-2:
        raise BadScan("its affine is degenerate")


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()
    return (text[0] if text else type(error).__name__)[:400]
