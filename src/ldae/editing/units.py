"""What alpha = 1 means: the unit of an edit's size, and the calibration of a direction on the training scans.

`conf/alpha` chooses the unit:

- `TrainingDistance`: the distance between the means of the two classes, projected onto the direction; for a number, one
  standard deviation of it. An edit then goes as far as people differ, whatever the spectrum of y.
- `PublishedStep`: sqrt(dim) along the unit direction in standardised y, the length of a typical standardised y.

The `Calibration` of a direction says how long these are in standardised y. It is measured on the fitting rows and
stored with the direction, so that `by=10` moves an age by ten years.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

from ldae.utils.errors import UserError

UNITS = {"age": "years"}  # of a column's numbers; columns whose names end in _mm3 are volumes
REMEDY = "run `python evaluate.py evaluation=[manipulation]` for this model again"


def unit_of(column: str) -> str:
    """The unit of the numbers in a column of the table: "years", "mm3"; empty if it is not known."""
    return UNITS.get(column, "mm3" if column.endswith("_mm3") else "")


def with_unit(number: str, column: str) -> str:
    """A formatted number with the unit of its column: "10 years"."""
    return f"{number} {unit_of(column)}".rstrip()


@dataclass(frozen=True)
class Calibration:
    """How far apart the fitting rows lie along a direction, in standardised y.

    Attributes:
        column: of the label.
        length: of two classes, the distance from the negative to the positive mean, projected onto the unit vector. Of
            a number, the length along the unit vector that moves the probe's read-out by 1 in the number's own unit.
            Negative if the label falls along the direction; never 0.
        classes: (negative, positive); None for a number.
        deviation: standard deviation of the number in the fitting rows; 1 for classes.
    """

    column: str
    length: float
    classes: tuple[str, str] | None = None
    deviation: float = 1.0

    @property
    def typical_length(self) -> float:
        """Length of one distance between the classes, or of one standard deviation of the number; positive."""
        return abs(self.length) * self.deviation

    @property
    def typical_change(self) -> str:
        """What `typical_length` is, in words."""
        if self.classes is not None:
            return f"the mean distance from {self.classes[0]} to {self.classes[1]} in the training scans"
        size = with_unit(f"{self.deviation:.3g}", self.column)
        return f"one standard deviation of {self.column} in the training scans, {size}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "classes": None if self.classes is None else list(self.classes)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Calibration":
        """The inverse of `to_dict`.

        Raises:
            ValueError: a length is 0 or not finite.
        """
        classes, length, deviation = value["classes"], float(value["length"]), float(value["deviation"])
        if not (math.isfinite(length) and length and math.isfinite(deviation) and deviation > 0):
            raise ValueError("the calibration of a direction is not a length")
        named = None if classes is None else (str(classes[0]), str(classes[1]))
        return cls(str(value["column"]), length, named, deviation)


@dataclass(frozen=True)
class AlphaScale:
    """The length of alpha = 1 in standardised y, and what it is in words."""

    length: float
    meaning: str

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "AlphaScale":
        """From the JSON values of its attributes.

        Raises:
            ValueError: the length is not a positive number.
        """
        length = float(value["length"])
        if not (math.isfinite(length) and length > 0):
            raise ValueError("the length of alpha = 1 is not a positive number")
        return cls(length, str(value["meaning"]))


class AlphaUnit(Protocol):
    """Chooses what alpha = 1 means.

    Implementations are plain classes: Hydra would pass a nested dataclass on as a config.
    """

    def scale(self, calibration: Calibration, dim: int) -> AlphaScale:
        """The length of alpha = 1 along a direction with this calibration; dim is that of y."""
        ...


class TrainingDistance:
    """alpha = 1 is the mean distance between the two classes, or one standard deviation of a number."""

    def scale(self, calibration: Calibration, dim: int) -> AlphaScale:
        """See AlphaUnit."""
        return AlphaScale(calibration.typical_length, calibration.typical_change)


class PublishedStep:
    """alpha = 1 is a step of sqrt(dim) along the unit direction in standardised y, as published."""

    def scale(self, calibration: Calibration, dim: int) -> AlphaScale:
        """See AlphaUnit."""
        return published_scale(dim)


def published_scale(dim: int) -> AlphaScale:
    """The published step of sqrt(dim), which directions have that were stored before units were."""
    return AlphaScale(math.sqrt(dim), f"a step of sqrt({dim}) along the unit direction in standardised y")


def refuse_uncountable(calibration: Calibration | None, meaning: str) -> Calibration:
    """The calibration, if it counts in the label's own unit.

    Args:
        meaning: of alpha = 1.

    Raises:
        UserError: there is none, or the label has two classes.
    """
    instead = f"give alpha (--alpha), of which 1 is {meaning}"
    if calibration is None:
        raise UserError(f"by (--by): this direction was stored without a calibration: {REMEDY}, or {instead}")
    if calibration.classes is not None:
        classes = " and ".join(calibration.classes)
        raise UserError(f"by (--by): {calibration.column} has two classes, {classes}, and is no number: {instead}")
    return calibration
