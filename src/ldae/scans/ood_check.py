"""Out-of-distribution check: is a scan prepared as the training scans were?

A model of registered, skull-stripped brains would embed and edit a raw head without complaint, and every number would
be wrong. Two numbers on a coarse grid detect this: the share of foreground voxels, and the correlation with the mean
training scan. Their limits follow from how much the training scans differ from each other: a cohort of unregistered
heads gets wider limits than a registered one.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool3d

from ldae.utils.errors import UserError
from ldae.utils.process_pool import available_cores

COARSE_CELLS = 16  # at most, along each axis
FOREGROUND = 0.1  # of the intensity range; voxels below are background
MARGIN = 3.0  # limits are this many times as far from the median as the most extreme training scan
MIN_SCANS = 4  # fewer do not tell how much scans differ
SHOWN = 10  # rejected scans that a message names
MAX_SCANS = 2000  # training scans that are measured, at most


@dataclass(frozen=True)
class OodCheck:
    """Limits that a scan must meet, measured on the training scans.

    Attributes:
        mean: (x, y, z), mean training scan on the coarse grid, in [0, 1].
        correlation: lowest accepted correlation with it.
        foreground: lowest and highest accepted share of foreground voxels.
    """

    mean: np.ndarray
    correlation: float
    foreground: tuple[float, float]

    @classmethod
    def fit(cls, volumes: Iterable[torch.Tensor]) -> "OodCheck | None":
        """Measure training volumes (1, X, Y, Z) in [0, 1]; None if there are fewer than MIN_SCANS."""
        measured = [(_coarse(volume), _foreground_share(volume)) for volume in volumes]
        if len(measured) < MIN_SCANS:
            return None
        coarse, shares = np.stack([volume for volume, _ in measured]), np.array([share for _, share in measured])
        mean, count = coarse.mean(0), len(coarse)
        # Each scan is compared with the mean of the others, as a new scan will be.
        others = [(count * mean - volume) / (count - 1) for volume in coarse]
        correlations = np.array([_correlation(*pair) for pair in zip(coarse, others, strict=True)])
        low, high = _limits(shares)
        return cls(_rounded(mean), _limits(correlations)[0], (max(low, 0.0), min(high, 1.0)))

    def reason_rejected(self, volume: torch.Tensor) -> str | None:
        """Reason a volume (1, X, Y, Z) is rejected, or None."""
        share, (low, high) = _foreground_share(volume), self.foreground
        if not low <= share <= high:
            return f"{share:.0%} of its field of view is foreground, {low:.0%} to {high:.0%} is expected"
        correlation = _correlation(_coarse(volume), self.mean)
        if correlation < self.correlation:
            return (
                f"it correlates {correlation:.2f} with the mean training scan, at least {self.correlation:.2f} is "
                "expected"
            )
        return None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, the mean as bytes in base64."""
        values = np.rint(255 * self.mean).astype(np.uint8)
        return {
            "correlation": self.correlation,
            "foreground": list(self.foreground),
            "shape": list(self.mean.shape),
            "mean": base64.b64encode(values.tobytes()).decode("ascii"),
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "OodCheck":
        """The inverse of `to_dict`.

        Raises:
            UserError: the values are damaged.
        """
        try:
            mean = np.frombuffer(base64.b64decode(value["mean"]), np.uint8).reshape(value["shape"]) / 255
            low, high = (float(limit) for limit in value["foreground"])
            return cls(mean, float(value["correlation"]), (low, high))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the out-of-distribution check of this model is damaged ({error}): encode or export it again"
            ) from error


def find_rejected(
    check: OodCheck, volumes: Callable[[Sequence[int]], torch.Tensor], rows: Iterable[int]
) -> dict[int, str]:
    """The scans among `rows` that fail the check, with the reason.

    Args:
        volumes: reads the scans of some rows, (B, 1, X, Y, Z) in [0, 1].
    """
    rows = [int(row) for row in rows]
    with ThreadPoolExecutor(available_cores()) as threads:
        reasons = threads.map(lambda row: check.reason_rejected(volumes([row])[0]), rows)
        return {row: reason for row, reason in zip(rows, reasons, strict=True) if reason is not None}


def describe_rejected(rejected: Mapping[int, str], names: Sequence[str], count: int) -> str:
    """One line: how many of `count` scans fail the out-of-distribution check, and which.

    Args:
        rejected: reason by row.
        names: of all rows.
    """
    if not rejected:
        return f"none of {count} scans fails the out-of-distribution check"
    shown = ", ".join(names[row] for row in list(rejected)[:SHOWN])
    more = f" and {len(rejected) - SHOWN} more" if len(rejected) > SHOWN else ""
    return (
        f"{len(rejected)} of {count} scans fail the out-of-distribution check, because they are not prepared as the "
        f"training scans were: {shown}{more}; the first one: {next(iter(rejected.values()))}"
    )


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Lowest and highest accepted value."""
    median = np.median(values)
    return (
        float(median - MARGIN * (median - values.min())),
        float(median + MARGIN * (values.max() - median)),
    )


def _rounded(mean: np.ndarray) -> np.ndarray:
    """Rounded as `to_dict` stores it, so that a check decides the same before and after it is stored."""
    return np.rint(255 * mean) / 255


def _coarse(volume: torch.Tensor) -> np.ndarray:
    sizes = tuple(min(size, COARSE_CELLS) for size in volume.shape[1:])
    return adaptive_avg_pool3d(volume.float(), sizes)[0].numpy().astype(np.float64)


def _foreground_share(volume: torch.Tensor) -> float:
    return float((volume > FOREGROUND).float().mean())


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])
