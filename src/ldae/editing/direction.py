"""A direction in y along which a label increases, and the edit along it.

With s(y) = (y - mean) / std, the scaling of the probe on the fitting rows (per feature as published, or one number for
all features; `conf/probe_scaling`), and a unit vector u, an edit by alpha is

    y' = mean + std (s(y) + alpha L u).

L, the length of alpha = 1, is the distance between the two classes or one standard deviation of a number, and
sqrt(dim) as published: `conf/alpha` chooses it (units.py). alpha > 0 moves towards the positive class or larger values.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from ldae.editing.linear_model import LinearModel
from ldae.editing.units import AlphaScale, Calibration, published_scale, refuse_uncountable

Array = TypeVar("Array", np.ndarray, Tensor)


class EditDirection(Protocol):
    """Anything that moves y."""

    def edit(self, y: Tensor, alpha: float) -> Tensor:
        """y' of y (B, dim)."""
        ...


@dataclass(frozen=True)
class Direction:
    """A unit vector in standardised y.

    Attributes:
        mean, std: (dim,) float64, of y in the fitting rows; std as the probe scales y.
        unit: (dim,) float64, u above.
        scale: length of alpha = 1; None: the published step, which directions have that an earlier version stored.
        calibration: how far apart the fitting rows lie along u; None if it was not measured.
        readout: the probe that the calibration of a number was measured with; it is stored with the direction.
    """

    mean: np.ndarray
    std: np.ndarray
    unit: np.ndarray
    scale: AlphaScale | None = None
    calibration: Calibration | None = None
    readout: LinearModel | None = None

    @property
    def alpha_scale(self) -> AlphaScale:
        """The length of alpha = 1 in standardised y, and its meaning in words."""
        return published_scale(len(self.unit)) if self.scale is None else self.scale

    def step(self) -> np.ndarray:
        """What alpha = 1 adds to y, (dim,)."""
        return self.std * self.alpha_scale.length * self.unit

    def edit(self, y: Array, alpha: float) -> Array:
        """y' of y (B, dim)."""
        step = alpha * self.step()
        return y + (step.astype(y.dtype) if isinstance(y, np.ndarray) else y.new_tensor(step))

    def alpha_for(self, by: float) -> float:
        """The alpha that moves the label by `by` in its own unit, such as years, as the probe reads it.

        Raises:
            UserError: the label has two classes, or the direction has no calibration.
        """
        return by * refuse_uncountable(self.calibration, self.alpha_scale.meaning).length / self.alpha_scale.length

    def amount_per_alpha(self) -> float | None:
        """What alpha = 1 changes: in the label's own unit, or in distances between the classes; None if not known."""
        return None if self.calibration is None else self.alpha_scale.length / self.calibration.length

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "unit": self.unit.tolist(),
            "alpha": None if self.scale is None else vars(self.scale),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "readout": None if self.readout is None else self.readout.to_dict(),
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Direction":
        """The inverse of `to_dict`; without "alpha", as an earlier version stored it, alpha = 1 is the published step.

        Raises:
            ValueError, KeyError, TypeError: `value` is damaged.
        """
        arrays = (np.asarray(value[name], np.float64) for name in ("mean", "std", "unit"))
        scale, calibration, readout = (value.get(name) for name in ("alpha", "calibration", "readout"))
        return cls(
            *arrays,
            None if scale is None else AlphaScale.from_dict(scale),
            None if calibration is None else Calibration.from_dict(calibration),
            None if readout is None else LinearModel.from_dict(readout),
        )
