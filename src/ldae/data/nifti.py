"""Read one scan from a NIfTI, Analyze or MGH file, and write volumes on its grid.

The gzip file and the header are checked before the voxels are read, and the voxels before they are used.
"""

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from ldae.data.intensities import correct_intensities
from ldae.data.scan_orientation import assume_orientation, compare_forms, reason_unoriented
from ldae.utils.errors import UserError
from ldae.utils.gzip_check import check_gzip, is_gzip

Source = str | Path | nib.spatialimages.SpatialImage

MAX_VOXELS = 2**28  # a head at 0.4 mm has 2**27; a header that states more is damaged
MIN_SIZE = 2
READING = 2  # to be raised when the voxels that are read from some files become others: see `is_read_as_before`
VOXEL_MM = (1e-2, 1e2)  # smallest and largest voxel size
ROUNDING = 1e-4  # relative; headers have float32, and an oblique affine rounds voxel sizes further

# Fields of a NIfTI header that say where the voxels are.
PLACEMENT = (
    "pixdim", "xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
# Small text files in the place of a scan whose content was not fetched: what they contain, and what fetches it.
POINTERS = {b"annex/objects/": "git annex get", b"version https://git-lfs": "git lfs pull"}
POINTER_BYTES = 200

GZIP_SUFFIXES = (".gz", ".mgz")

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


@dataclass(frozen=True)
class LoadedScan:
    """A volume as it was read.

    Attributes:
        data: voxels (X, Y, Z) float32 in the axes of the file.
        affine: voxels to mm (RAS+), (4, 4) float64.
        offset: what was subtracted from the intensities of the head, see ldae.data.intensities.
        notes: remarks on what is unusual in the file, or was changed.
        changed: whether any intensity is another than in the file.
    """

    data: np.ndarray
    affine: np.ndarray
    offset: float = 0.0
    notes: tuple[str, ...] = ()
    changed: bool = False


def load_scan(source: Source, orientation: str | None = None) -> LoadedScan:
    """Read a scan, with 0 in the background and positive intensities in the head.

    Args:
        orientation: RAS or LAS, assumed if the file states no orientation; None rejects such a file.

    Raises:
        BadScan: it cannot be read, is not a single 3-D volume, has no usable affine, has infinite voxels or NaN inside
            the head, or is constant.
    """
    with _naming(source):
        image, notes = _open_image(source, orientation)
        data = _read_voxels(image)
        try:
            found = correct_intensities(data, np.dtype(image.get_data_dtype()), *_scaling(image))
        except ValueError as error:
            raise BadScan(str(error)) from error
        if found.data.min() == found.data.max():
            raise BadScan("all voxels are equal" if found.data.any() else "all voxels are zero")
        affine, notes = np.asarray(image.affine, dtype=np.float64), (*notes, *found.notes)
        return LoadedScan(found.data, affine, found.offset, notes, found.changed)


def is_read_as_before(path: str | Path) -> bool:
    """Whether earlier versions, which knew READING 1, read the same voxels from a file.

    They did not compare checksums, and kept a background other than 0, negative and wrapped intensities. All that they
    rejected is read anew.
    """
    try:
        return not load_scan(path).changed
    except BadScan:
        return False


def load_label_map(source: Source, orientation: str | None = None) -> LoadedScan:
    """Read a label map or a mask, whose values are kept as they are; all of them may be equal.

    Raises:
        BadScan: as `load_scan`; any voxel is not finite.
    """
    with _naming(source):
        image, notes = _open_image(source, orientation)
        data = _read_voxels(image)
        if not np.isfinite(data).all():
            raise BadScan("it has NaN or infinite voxels")
        return LoadedScan(data, np.asarray(image.affine, dtype=np.float64), 0.0, notes)


def load_image(source: Source, orientation: str | None = None) -> nib.spatialimages.SpatialImage:
    """Open an image without reading its voxels. The header is checked; `orientation` is as in `load_scan`.

    Raises:
        BadScan: it cannot be read, is not a single 3-D volume, or has no usable affine.
    """
    with _naming(source):
        return _open_image(source, orientation)[0]


def states_orientation(path: str | Path) -> bool:
    """Whether a file can be read and states its orientation."""
    try:
        with _naming(path):
            return reason_unoriented(nib.load(path)) is None
    except BadScan:
        return False


def find_partner(path: str | Path) -> Path | None:
    """The other file of a pair of header and voxels (.hdr and .img), or None if `path` is no part of such a pair."""
    path = Path(path)
    for own, other in ((".hdr", ".img"), (".img", ".hdr")):
        stem, suffix, ending = path.name.rpartition(own)
        if suffix and ending in ("", ".gz"):
            found = (path.with_name(f"{stem}{other}{end}") for end in ("", ".gz"))
            return next((file for file in found if file.is_file()), None)
    return None


def reason_missing(path: str | Path) -> str:
    """Reason why there is no file at `path`; a link to a missing file is named as one."""
    if not os.path.islink(path):
        return "no such file"
    target = os.readlink(path)
    remedy = ": fetch it by `git annex get`" if "annex/objects" in target else ""
    return f"a link to a file that is missing ({target}){remedy}"


def nifti_like(data: np.ndarray, image: nib.spatialimages.SpatialImage) -> nib.Nifti1Image:
    """A float32 NIfTI with the voxels `data` and the shape, affine and orientation codes of `image`.

    Nothing else of the header is copied: descriptive fields and extensions may name the patient.
    """
    result = nib.Nifti1Image(data.astype(np.float32).reshape(image.shape), image.affine)
    if isinstance(image.header, nib.Nifti1Header):
        for name in PLACEMENT:
            result.header[name] = image.header[name]
    return result


@contextmanager
def _naming(source: Source) -> Iterator[None]:
    """Turn what nibabel, gzip and the checks raise into BadScan with the path of the file."""
    path = source if isinstance(source, str | Path) else None
    try:
        yield
    except BadScan as error:
        raise BadScan(error.reason, path) from None
    except FileNotFoundError as error:
        raise BadScan("no such file" if path is None else reason_missing(path), path) from error
    except _UNREADABLE as error:
        # The reason is written to tables, but nibabel's names the file with its whole path.
        line = _first_line(error) if path is None else _first_line(error).replace(str(path), Path(path).name)
        raise BadScan(f"unreadable ({line})", path) from error


def _open_image(source: Source, orientation: str | None) -> tuple[nib.spatialimages.SpatialImage, tuple[str, ...]]:
    """Open an image, and check its files and its header. Returns the image and remarks."""
    is_file = isinstance(source, str | Path)
    notes = _check_content(Path(source)) if is_file else []
    image = nib.load(source) if is_file else source
    if not isinstance(image, nib.spatialimages.SpatialImage):
        raise BadScan(f"not a volume but {type(image).__name__}")
    if is_file:
        for other in _other_files(image, Path(source)):
            notes += _check_content(other)
    _check_shape(image)
    unoriented = reason_unoriented(image)
    if unoriented is not None:
        if orientation is None:
            raise BadScan(unoriented)
        image = assume_orientation(image, orientation)
        notes.append(f"its file states no orientation: {orientation} was assumed")
    _check_affine(image)
    contradiction = compare_forms(image)
    return image, tuple([*notes, contradiction] if contradiction else notes)


def _check_content(path: Path) -> list[str]:
    """Refuse a damaged gzip file and a pointer without its content. Returns remarks."""
    if is_gzip(path):
        if path.suffix.lower() not in GZIP_SUFFIXES:
            raise BadScan(f"a gzip file without .gz in its name: rename it to {path.name}.gz")
        garbage = check_gzip(path)
        return [f"{garbage} bytes after the end of the gzip file were ignored"] if garbage else []
    with open(path, "rb") as handle:
        start = handle.read(POINTER_BYTES)
    for mark, remedy in POINTERS.items():
        if mark in start:
            raise BadScan(f"a pointer without its content: fetch it by `{remedy}`")
    return []


def _other_files(image: nib.spatialimages.SpatialImage, path: Path) -> list[Path]:
    """The files of an image other than `path`, such as the voxels beside a header."""
    files = {Path(holder.filename) for holder in image.file_map.values() if holder.filename}
    return sorted(file for file in files if file != path and file.is_file())


def _read_voxels(image: nib.spatialimages.SpatialImage) -> np.ndarray:
    """(X, Y, Z) float32, an array of its own."""
    # Large scaled integers overflow to infinity in float32, which is rejected later.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array(image.dataobj).astype(np.float32, copy=False).reshape(image.shape[:3])


def _scaling(image: nib.spatialimages.SpatialImage) -> tuple[float, float]:
    """Slope and intercept between the values in the file and the intensities; 1 and 0 where slices have their own."""
    slope, intercept = getattr(image.dataobj, "slope", 1.0), getattr(image.dataobj, "inter", 0.0)
    return (float(slope), float(intercept)) if np.ndim(slope) == np.ndim(intercept) == 0 else (1.0, 0.0)


def _check_shape(image: nib.spatialimages.SpatialImage) -> None:
    shape = tuple(int(size) for size in image.shape)
    if len(shape) < 3 or any(size != 1 for size in shape[3:]) or min(shape) < 1:
        raise BadScan(f"not one 3-D volume: shape {list(shape)}")
    if min(shape[:3]) < MIN_SIZE:
        raise BadScan(f"not a volume: shape {list(shape)}")
    if np.prod([float(size) for size in shape]) > MAX_VOXELS:
        raise BadScan(f"its header states {list(shape)} voxels, more than {MAX_VOXELS}")
    if np.dtype(image.get_data_dtype()).kind not in "iufb":
        raise BadScan(f"its voxels are not real numbers but {image.get_data_dtype()}")


def _check_affine(image: nib.spatialimages.SpatialImage) -> None:
    if image.affine is None or not np.isfinite(image.affine).all():
        raise BadScan("it has no finite affine")
    sizes = nib.affines.voxel_sizes(image.affine)
    if not (VOXEL_MM[0] * (1 - ROUNDING) <= sizes.min() and sizes.max() <= VOXEL_MM[1] * (1 + ROUNDING)):
        raise BadScan(f"its voxels measure {[float(f'{size:.3g}') for size in sizes]} mm")
    # 1 for perpendicular axes; near 0 if two axes are parallel.
    if abs(np.linalg.det(image.affine[:3, :3] / sizes)) < 1e-2:
        raise BadScan("its affine is degenerate")


def _first_line(error: BaseException) -> str:
    text = str(error).splitlines()
    return (text[0] if text else type(error).__name__)[:400]
