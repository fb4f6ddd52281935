"""Where the features of a predictor come from: an array (y, columns of the table), or scans that are read in batches.

A source is fitted on some rows, which gives blocks for a probe (blocks.py), and unfolds a fitted probe into a model of
the features themselves, which can be stored and applied to another cohort.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from ldae.editing.linear_model import LinearModel
from ldae.evaluation.probes.blocks import Block
from ldae.evaluation.probes.principal_components import (
    MAX_EXACT,
    Components,
    ExactComponents,
    LeadingComponents,
    ScanMatrix,
)


class FittedSource(Protocol):
    """A source whose reduction to components, if it has one, is fitted."""

    def block(self, rows: np.ndarray) -> Block:
        """The features of these rows for a probe."""
        ...

    def unfold(self, model: LinearModel) -> LinearModel:
        """A model of the features of `block`, as one of the source's own features, (D,)."""
        ...


class Source(Protocol):
    """Features of all scans of a cohort.

    Attributes:
        features: their number, D.
    """

    features: int

    def fit_on(self, rows: np.ndarray, seed: int) -> FittedSource:
        """The source fitted on these rows."""
        ...

    def decide(self, model: LinearModel, rows: np.ndarray) -> np.ndarray:
        """The decision of a model of the source's own features for these rows, (n,)."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """Features in memory; nothing is fitted.

    Attributes:
        values: (N, D), NaN where missing.
        are_columns: they are columns of a table, in different units.
    """

    values: np.ndarray
    are_columns: bool = False

    @property
    def features(self) -> int:
        """D."""
        return self.values.shape[1]

    def fit_on(self, rows: np.ndarray, seed: int) -> "ArraySource":
        """The source itself."""
        return self

    def block(self, rows: np.ndarray) -> Block:
        """The features of these rows."""
        return Block(self.values[rows], are_columns=self.are_columns)

    def unfold(self, model: LinearModel) -> LinearModel:
        """The model itself."""
        return model

    def decide(self, model: LinearModel, rows: np.ndarray) -> np.ndarray:
        """See `Source`."""
        return model.decision(self.values[rows])


class ComponentSource:
    """Principal components of scans.

    Args:
        matrix: the scans.
        widths: numbers of components to choose from.
        known_rows: the rows that the components are fitted on, whatever the rows of a fold; None: the fold's own.
    """

    def __init__(self, matrix: ScanMatrix, widths: Sequence[int], known_rows: np.ndarray | None = None) -> None:
        self._matrix, self._widths, self._known_rows = matrix, list(widths), known_rows
        self._latest: tuple[bytes, FittedComponents] | None = None

    @property
    def features(self) -> int:
        """Values of a scan."""
        return self._matrix.features

    def fit_on(self, rows: np.ndarray, seed: int) -> "FittedComponents":
        """The components of these rows, or of `known_rows`."""
        chosen = rows if self._known_rows is None else self._known_rows
        key = np.asarray(chosen).tobytes()
        if self._latest is None or self._latest[0] != key:
            exact = self._matrix.count <= MAX_EXACT
            found = (
                ExactComponents(self._matrix, chosen)
                if exact
                else LeadingComponents(self._matrix, chosen, max(self._widths), seed)
            )
            # Exact components of a fold's own rows are computed again in the folds by which the penalty is chosen.
            refitted = exact and self._known_rows is None
            self._latest = key, FittedComponents(found, self._widths, not refitted)
        return self._latest[1]

    def decide(self, model: LinearModel, rows: np.ndarray) -> np.ndarray:
        """See `Source`."""
        return np.concatenate([model.decision(x) for _, x in self._matrix.batches(rows)])


@dataclass(frozen=True)
class FittedComponents:
    """Fitted principal components of scans.

    Attributes:
        components: of the rows that they were fitted on.
        widths: numbers of components to choose from.
        are_final: the leading components are used as they are; otherwise those of each fold are computed from them.
    """

    components: Components
    widths: Sequence[int]
    are_final: bool

    def block(self, rows: np.ndarray) -> Block:
        """The components of these rows."""
        scores = self.components.scores(rows)
        return Block(scores[:, : max(self.widths)] if self.are_final else scores, self.widths, self.are_final)

    def unfold(self, model: LinearModel) -> LinearModel:
        """The model as one of all values of a scan."""
        slopes = model.coef / model.std
        scores = np.concatenate([slopes, np.zeros(self.components.count - len(slopes))])
        mean, vector = self.components.unfold(scores)
        intercept = model.intercept - float(slopes @ model.mean)
        return replace(model, mean=mean, std=np.ones_like(mean), coef=vector, intercept=intercept)


def split_model(model: LinearModel, sizes: Sequence[int]) -> list[LinearModel]:
    """A model of features side by side as one per group of features, (D,) each; the first has the intercept."""
    ends = np.cumsum(sizes)[:-1]
    arrays = (np.split(values, ends) for values in (model.mean, model.std, model.coef))
    return [
        replace(model, mean=mean, std=std, coef=coef, intercept=model.intercept if number == 0 else 0.0)
        for number, (mean, std, coef) in enumerate(zip(*arrays, strict=True))
    ]


def join_models(models: Sequence[LinearModel]) -> LinearModel:
    """The inverse of `split_model`."""
    mean, std, coef = (np.concatenate([getattr(model, name) for model in models]) for name in ("mean", "std", "coef"))
    return replace(models[0], mean=mean, std=std, coef=coef, intercept=sum(model.intercept for model in models))
