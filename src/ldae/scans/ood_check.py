"""What the scans that a model was trained on look like, so that others are not taken for them.

A raw head given to a model of registered, skull-stripped brains would be embedded and edited without complaint, and
every number would be wrong. Two numbers tell: the share of voxels that are not background, and the correlation with
the training scans' mean, both on a coarse grid. How much the training scans differ among themselves says how much is
too much: cohorts of unregistered heads allow more than registered ones.
"""

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool3d

from ldae.utils.errors import UserError

COARSE = 16  # cells along an axis, at most
FOREGROUND = 0.1  # of the intensity range; below it is background
MARGIN = 3.0  # times the distance of the training scans' extreme from their median
MAX_SCANS = 2000  # scans that are looked at, at most


@dataclass(frozen=True)
class OodCheck:
    """Of the training scans.

    Attributes:
        mean: (x, y, z) their mean on the coarse grid, in [0, 1].
        correlation: lowest that is accepted.
        foreground: lowest and highest share that is accepted.
    """

    mean: np.ndarray
    correlation: float
    foreground: tuple[float, float]

    @classmethod
    def fit(cls, volumes: Iterable[torch.Tensor]) -> "OodCheck | None":
        """From volumes (1, X, Y, Z) in [0, 1]; None of fewer than four: they say nothing about others."""
        found = [(_coarse(volume), _foreground(volume)) for volume in volumes]
        if len(found) < 4:
            return None
        coarse, shares = np.stack([item[0] for item in found]), np.array([item[1] for item in found])
        mean, count = coarse.mean(0), len(coarse)
        # Each scan against the mean of the others, as a new one will be.
        others = [(count * mean - volume) / (count - 1) for volume in coarse]
        fits = np.array([_correlation(*pair) for pair in zip(coarse, others, strict=True)])
        low, high = _bounds(shares)
        return cls(_stored(mean), _bounds(fits)[0], (max(low, 0.0), min(high, 1.0)))

    def reason_rejected(self, volume: torch.Tensor) -> str | None:
        """Why a volume (1, X, Y, Z) cannot be a scan like those, or None."""
        share, (low, high) = _foreground(volume), self.foreground
        if not low <= share <= high:
            return (
                f"{share:.0%} of its field of view is not background, where the training scans allow {low:.0%} to "
                f"{high:.0%}"
            )
        fit = _correlation(_coarse(volume), self.mean)
        if fit < self.correlation:
            return f"it correlates {fit:.2f} with the mean training scan, where at least {self.correlation:.2f} is due"
        return None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; the mean as bytes in base64."""
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
            low, high = (float(bound) for bound in value["foreground"])
            return cls(mean, float(value["correlation"]), (low, high))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the likeness of this model is damaged ({error}): encode or export it again") from error


def _bounds(values: np.ndarray) -> tuple[float, float]:
    middle = np.median(values)
    return (
        float(middle - MARGIN * (middle - values.min())),
        float(middle + MARGIN * (values.max() - middle)),
    )


def _stored(mean: np.ndarray) -> np.ndarray:
    """As `to_dict` keeps it, so that a model says the same before and after it is written."""
    return np.rint(255 * mean) / 255


def _coarse(volume: torch.Tensor) -> np.ndarray:
    sizes = tuple(min(size, COARSE) for size in volume.shape[1:])
    return adaptive_avg_pool3d(volume.float(), sizes)[0].numpy().astype(np.float64)


def _foreground(volume: torch.Tensor) -> float:
    return float((volume > FOREGROUND).float().mean())


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])
