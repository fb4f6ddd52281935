"""What can be read out of y: the probes and directions that evaluate.py stores with a model as JSON.

probes.json      frozen linear probes of y (evaluation=probes)
directions.json  directions along which labels increase, with the unit of alpha and its calibration, and the settings of
                 an edit (evaluation=manipulation)

A number is read out with its regression to the mean divided out, if its probe knows that (LinearModel.bias).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldae.editing.direction import Direction
from ldae.editing.editor import Editor
from ldae.editing.frozen_probes import EMBEDDING, read_frozen_probes
from ldae.editing.linear_model import LinearModel
from ldae.editing.units import with_unit
from ldae.utils.errors import UserError
from ldae.utils.files import read_json

FULL_INVERSION = Editor(depth=1.0)  # if no evaluation has stored settings


@dataclass(frozen=True)
class Readouts:
    """Probes and directions by name, and the settings of an edit."""

    probes: Mapping[str, LinearModel] = field(default_factory=dict)
    directions: Mapping[str, Direction] = field(default_factory=dict)
    editor: Editor = FULL_INVERSION

    @classmethod
    def read(cls, probes: Path | None, directions: Path | None, weights: str) -> "Readouts":
        """Read both files, where they exist.

        Args:
            weights: hash of the networks; files that were made with other networks are refused.

        Raises:
            UserError: a file is damaged or belongs to other networks.
        """
        frozen = {} if probes is None else read_frozen_probes(probes, weights)
        models = {name: predictors[EMBEDDING].model for name, predictors in frozen.items()}
        if directions is None:
            return cls(models)
        try:
            stored = read_json(directions)
            found = {name: Direction.from_dict(value) for name, value in stored["directions"].items()}
            editor, stored_weights = Editor(**stored.get("editor", vars(FULL_INVERSION))), stored["weights"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{directions} is damaged ({error}): run evaluation=[manipulation] again") from error
        if stored_weights != weights:
            raise UserError(f"{directions} belongs to another encoder: run evaluation=[manipulation] again")
        fitted = {name: direction.readout for name, direction in found.items() if direction.readout is not None}
        return cls({**fitted, **models}, found, editor)

    @property
    def names(self) -> list[str]:
        """Every name that `direction` accepts."""
        return sorted({*self.directions, *self.probes})

    def direction(self, name: str) -> Direction:
        """The stored direction of this name; without one, the direction of the probe's weights, as published.

        alpha > 0 moves towards the probe's positive class or larger values.

        Raises:
            UserError: there is neither.
        """
        if name in self.directions:
            return self.directions[name]
        if name not in self.probes:
            known = ", ".join(self.names) or "none; run `python evaluate.py evaluation=[probes,manipulation]`"
            raise UserError(f"this model has no probe or direction '{name}'; it has {known}")
        model = self.probes[name]
        return Direction(model.mean, model.std, model.coef / np.linalg.norm(model.coef))

    def predict_label(self, name: str, y: np.ndarray) -> list[str]:
        """Prediction of probe `name` for each y (B, dim) as text: "AD 83 %", "age 71.2 years"; [] without the probe."""
        model = self.probes.get(name)
        if model is None:
            return []
        label = model.column if model.classes is None else model.classes[1]
        return [f"{label} {value}" for value in _in_words(model, y)]

    def describe_change(self, name: str, before: np.ndarray, after: np.ndarray) -> list[str]:
        """Predictions before and after an edit, y (B, dim) each: "age 63.0 -> 73.0 years"; [] without such a probe."""
        model = self.probes.get(name)
        if model is None:
            return []
        label, short = (model.column, True) if model.classes is None else (model.classes[1], False)
        pairs = zip(_in_words(model, before, without_unit=short), _in_words(model, after), strict=True)
        return [f"{label} {first} -> {second}" for first, second in pairs]


def _in_words(model: LinearModel, y: np.ndarray, without_unit: bool = False) -> list[str]:
    """Each prediction as "83 %" or "71.2 years"."""
    values = model.predict(np.asarray(y, np.float64))
    if model.classes is not None:
        return [f"{value:.0%}".replace("%", " %") for value in values]
    numbers = [f"{value:.1f}" for value in model.unbiased(values)]
    return numbers if without_unit else [with_unit(number, model.column) for number in numbers]
