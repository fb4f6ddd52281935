"""Intensities of a scan as the steps expect them: finite, not wrapped around, 0 in the background and above it inside.

What is normal is kept to the bit: a scan whose background is 0 and whose voxels are not negative is not changed.
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

CONSTANT_SHARE = 0.8  # share of the voxels on the six faces that have one value, if this is the background's
# Signed intensities, such as z-scores, have a first percentile below minus this share of the 99th. Interpolation causes
# negative intensities too, but smaller ones.
SIGNED_SHARE = 0.1
NOTED_SHARE = 1e-3  # share of negative voxels from which they are noted
NEGATIVE = "{:.1%} of its voxels are negative: they become 0"
MARGIN = 0.01  # share of the range of intensities between the background and the darkest voxel of a shifted scan


@dataclass(frozen=True)
class Intensities:
    """Intensities of a scan, and what was changed.

    Attributes:
        data: (X, Y, Z) float32.
        changed: whether any intensity is another than in the file.
        offset: what was subtracted from the foreground.
        notes: remarks on what was changed or is unusual.
    """

    data: np.ndarray
    changed: bool = False
    offset: float = 0.0
    notes: tuple[str, ...] = ()


def correct_intensities(data: np.ndarray, stored: np.dtype, slope: float = 1.0, intercept: float = 0.0) -> Intensities:
    """Correct the intensities of a scan.

    Args:
        data: (X, Y, Z) float32; it is changed in place.
        stored: data type of the voxels in the file.
        slope, intercept: data = slope * stored value + intercept.

    Raises:
        ValueError: some voxels are infinite, or are NaN inside the head; one line.
    """
    finite = np.isfinite(data)
    missing = None if finite.all() else ~finite
    notes = []
    if missing is not None:
        check_missing(data, missing)
        data[missing] = 0
        notes.append(f"{missing.mean():.1%} of its voxels are NaN, outside of the head: they were set to 0")
    if data.min() < 0 and stored.kind == "i" and stored.itemsize == 2:
        wrapped = _wrapped_around((data - intercept) / slope)
        if wrapped.any():
            data[wrapped] += 2**16 * slope
            notes.append(f"{wrapped.sum()} voxels had overflowed 16 bits and were negative: they were unwrapped")
    result = zero_background(data, missing)
    return replace(result, changed=bool(notes) or result.changed, notes=(*notes, *result.notes))


def check_missing(data: np.ndarray, missing: np.ndarray) -> None:
    """Refuse voxels without a value, unless they surround the head.

    Voxels outside of SPM's mask, or outside of the field of view of a scan that SPM resampled, are NaN.

    Args:
        missing: (X, Y, Z) bool, voxels that are not finite.

    Raises:
        ValueError: some are infinite, are enclosed by other voxels, or fill a slice between others.
    """
    if missing.all() or np.isinf(data[missing]).any():
        raise ValueError("it has NaN or infinite voxels")
    components, _ = ndimage.label(missing)
    faces = [np.take(components, (0, -1), axis=axis).ravel() for axis in range(3)]
    enclosed = missing & ~np.isin(components, np.unique(np.concatenate(faces)))
    empty_slices = 0
    for axis in range(3):
        used = np.flatnonzero((~missing).any(axis=tuple(other for other in range(3) if other != axis)))
        empty_slices += np.ptp(used) + 1 - len(used) if len(used) else 0
    if enclosed.any() or empty_slices:
        raise ValueError("it has NaN or infinite voxels inside the head")


def zero_background(data: np.ndarray, missing: np.ndarray | None = None) -> Intensities:
    """Make the background 0 and the foreground positive, if the background is another constant or the scale is signed.

    MP2RAGE UNI images are between -0.5 and 0.5, z-scores and normalised images around 0: without this, every voxel
    darker than 0 would be clipped to 0.

    Args:
        data: (X, Y, Z) float32.
        missing: voxels that had no value and are background, or None.
    """
    constant = constant_background(data, missing)
    if not constant and data.min() >= 0:
        return Intensities(data)
    background = np.zeros(data.shape, bool) if constant is None else data == constant
    if missing is not None:
        background |= missing
    foreground = data[~background]
    if not len(foreground):
        return Intensities(data)
    if not constant and not _is_signed(foreground):
        negative = float((data < 0).mean())
        return Intensities(data, notes=(NEGATIVE.format(negative),) if negative > NOTED_SHARE else ())
    notes = [f"its background was {constant:g}: it was set to 0"] if constant else []
    offset, lowest, highest = constant or 0.0, float(foreground.min()), float(foreground.max())
    if lowest <= offset:
        offset = lowest - MARGIN * (highest - lowest)
        notes.append(f"its head was as dark as {lowest:g}: {offset:g} was subtracted from it, so that none of it is 0")
    return Intensities(np.where(background, np.float32(0), data - np.float32(offset)), True, offset, tuple(notes))


def constant_background(data: np.ndarray, missing: np.ndarray | None = None) -> float | None:
    """The value of nearly all voxels on the six faces of the volume; None if there is no such value."""
    faces = [np.take(data, (0, -1), axis=axis).ravel() for axis in range(3)]
    values = np.concatenate(faces)
    if missing is not None:
        known = ~np.concatenate([np.take(missing, (0, -1), axis=axis).ravel() for axis in range(3)])
        values = values[known]
    if not len(values):
        return None
    levels, counts = np.unique(values, return_counts=True)
    return float(levels[counts.argmax()]) if counts.max() >= CONSTANT_SHARE * len(values) else None


def _is_signed(foreground: np.ndarray) -> bool:
    low, high = np.percentile(foreground, (1, 99))
    return bool(low < -SIGNED_SHARE * abs(high))


def _wrapped_around(stored: np.ndarray) -> np.ndarray:
    """Voxels whose stored 16-bit integers have overflowed, (X, Y, Z) bool.

    Args:
        stored: (X, Y, Z), stored values.
    """
    negative, bright = stored < 0, stored > 2**14
    border = ndimage.binary_dilation(negative) & ~negative
    # Only the brightest voxels overflow: all results are very negative, and most of their neighbours are bright.
    if border.any() and stored[negative].max() < -(2**14) and bright[border].mean() > 0.5:
        return negative
    return np.zeros(stored.shape, bool)
