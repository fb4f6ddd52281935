"""Predictors that are ready to predict: one fitted in this cohort, or one that was stored and comes from another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ldae.editing.frozen_probes import FrozenProbe
from ldae.editing.linear_model import LinearModel
from ldae.evaluation.probes.baselines import RENAMED, Features
from ldae.evaluation.probes.sources import FittedSource, join_models, split_model


class Predictor(Protocol):
    """Predicts a label of scans of one cohort.

    Attributes:
        columns: the features that it reads from the table.
    """

    columns: list[str]

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Probability of the positive class, or the predicted number, (n,), of these rows."""
        ...

    def unbiased(self, prediction: np.ndarray) -> np.ndarray:
        """Predictions corrected for regression to the mean; see LinearModel."""
        ...


@dataclass(frozen=True)
class FittedPredictor:
    """A predictor fitted in this cohort.

    Attributes:
        columns: the features that it reads from the table.
        fitted: its sources, fitted on the same rows.
        model: of their blocks side by side.
    """

    columns: list[str]
    fitted: Sequence[FittedSource]
    model: LinearModel

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """See `Predictor`."""
        values = [source.block(rows).values for source in self.fitted]
        return self.model.predict(np.concatenate([np.zeros((len(rows), 0)), *values], 1))

    def unbiased(self, prediction: np.ndarray) -> np.ndarray:
        """See `Predictor`."""
        return self.model.unbiased(prediction)

    def freeze(self) -> FrozenProbe:
        """The predictor as a model of its sources' own features, for other cohorts."""
        if not self.fitted:
            return FrozenProbe(self.columns, self.model)
        sizes = [source.block(np.zeros(1, int)).values.shape[1] for source in self.fitted]
        parts = zip(self.fitted, split_model(self.model, sizes), strict=True)
        return FrozenProbe(self.columns, join_models([source.unfold(model) for source, model in parts]))


@dataclass(frozen=True)
class FrozenPredictor:
    """A stored predictor, applied to a cohort.

    Attributes:
        columns: the features that it reads from the table.
        name: of the predictor.
        features: of the cohort.
        model: of the features of its sources side by side.
    """

    columns: list[str]
    name: str
    features: Features
    model: LinearModel

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """See `Predictor`.

        Raises:
            UserError: the sources do not have the features that it was fitted on.
        """
        _, sources = self.features(self.name, self.columns)
        sizes = [source.features for source in sources]
        self.model.check_features(sum(sizes))
        if not sizes:
            return self.model.predict(np.zeros((len(rows), 0)))
        parts = zip(sources, split_model(self.model, sizes), strict=True)
        return self.model.from_decision(sum(source.decide(model, rows) for source, model in parts))

    def unbiased(self, prediction: np.ndarray) -> np.ndarray:
        """See `Predictor`."""
        return self.model.unbiased(prediction)


@dataclass(frozen=True)
class KnownPredictions:
    """Predictions that something else has made of every scan, such as a network with its own head.

    Attributes:
        values: (N,), probabilities of the positive class, or numbers.
        columns: none.
    """

    values: np.ndarray
    columns: list[str] = field(default_factory=list)

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """See `Predictor`."""
        return self.values[rows]

    def unbiased(self, prediction: np.ndarray) -> np.ndarray:
        """The predictions themselves: a correction would have to be fitted on scans that were not trained on."""
        return prediction


def apply_frozen(frozen: Mapping[str, FrozenProbe], features: Features) -> dict[str, Predictor]:
    """Stored predictors on a cohort, by their present names."""
    present = {RENAMED.get(name, name): probe for name, probe in frozen.items()}
    return {name: FrozenPredictor(probe.columns, name, features, probe.model) for name, probe in present.items()}
