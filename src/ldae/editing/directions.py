"""Directions in y along which a label grows: estimators to choose from by config, and the edit they make.

With s(y) = (y - mean) / std on the fitting rows and u a unit vector,

    y' = mean + std (s(y) + alpha sqrt(dim) u),

so alpha = 1 is a step as long as a typical standardised y. alpha > 0 moves towards the positive class or larger number.

What predicts a label best (the probe's weights, as published) is not what changes with it (the pattern cov(y) w, Haufe
et al. 2014, doi 10.1016/j.neuroimage.2013.10.067): edits want the latter. And what changes with a label in a cohort
may be something else that goes with it, such as age: `HeldFixed` and `ProjectedOut` take such columns away.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd

from ldae.editing.linear_model import LinearModel
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Direction:
    """mean, std, unit: (dim,) float64; unit has length 1 in standardised y."""

    mean: np.ndarray
    std: np.ndarray
    unit: np.ndarray

    def step(self) -> np.ndarray:
        """What alpha = 1 adds to y, (dim,)."""
        return self.std * np.sqrt(len(self.unit)) * self.unit

    def edit(self, y: Any, alpha: float) -> Any:
        """y' of y (B, dim), a tensor or an array."""
        step = alpha * self.step()
        if isinstance(y, np.ndarray):
            return y + step.astype(y.dtype)
        return y + y.new_tensor(step)

    def to_dict(self) -> dict[str, list[float]]:
        """As JSON values."""
        return {"mean": self.mean.tolist(), "std": self.std.tolist(), "unit": self.unit.tolist()}

    @classmethod
    def from_dict(cls, value: dict[str, list[float]]) -> "Direction":
        """The inverse of `to_dict`."""
        return cls(*(np.asarray(value[name], np.float64) for name in ("mean", "std", "unit")))


class Probe(Protocol):
    """What a direction needs of a linear probe; `conf/probe` names the implementations."""

    column: str

    def target(self, table: pd.DataFrame) -> np.ndarray:
        """The label of every row, (N,): 0/1 or a number, NaN where it is unknown."""
        ...

    def reason_unusable(self, truth: np.ndarray, subjects: np.ndarray, fitting: bool) -> str | None:
        """Reason these rows cannot be used, or None."""
        ...

    def fit(self, features: np.ndarray, truth: np.ndarray, subjects: np.ndarray, seed: int) -> LinearModel:
        """The probe fitted on features (N, D) and truth (N,)."""
        ...


@dataclass(frozen=True)
class FittingRows:
    """Fitting rows. x: (N, dim) standardised y; truth: (N,), 0/1 or a number; table: their rows."""

    x: np.ndarray
    truth: np.ndarray
    table: pd.DataFrame
    probe: Probe
    seed: int


class DirectionEstimator(Protocol):
    """From the fitting rows to a vector (dim,) of any length.

    Estimators are no dataclasses: Hydra would hand a nested one on as a config.
    """

    def estimate(self, sample: FittingRows) -> np.ndarray: ...


class Weights:
    """The probe's weights w, as published."""

    def estimate(self, sample: FittingRows) -> np.ndarray:
        """w of the probe fitted on standardised y."""
        model = sample.probe.fit(sample.x, sample.truth, sample.table["subject"].to_numpy(str), sample.seed)
        # The probe may standardise again (residuals have no unit variance): weights of x itself.
        return model.coef / model.std


class Pattern:
    """cov(y) w: how y moves with the probe's decision (Haufe et al. 2014)."""

    def estimate(self, sample: FittingRows) -> np.ndarray:
        """cov(x) w."""
        centred = sample.x - sample.x.mean(0)
        return centred.T @ (centred @ Weights().estimate(sample)) / len(centred)


class MeanDifference:
    """Difference of class means; for a number cov(y, number), which is the same thing."""

    def estimate(self, sample: FittingRows) -> np.ndarray:
        """cov(x, truth)."""
        return (sample.x - sample.x.mean(0)).T @ (sample.truth - sample.truth.mean()) / len(sample.x)


class Shrunken:
    """Between the two: ((1 - s) W + s I)^-1 cov(y, label), with W the covariance left when the label is known.

    Args:
        shrinkage: s; 1 is MeanDifference, towards 0 the weights of linear discriminant analysis.
    """

    def __init__(self, shrinkage: float = 0.5) -> None:
        if not 0 < shrinkage <= 1:
            raise UserError(f"direction.shrinkage={shrinkage}: more than 0 and at most 1 is needed")
        self.shrinkage = shrinkage

    def estimate(self, sample: FittingRows) -> np.ndarray:
        """The vector above."""
        slope = MeanDifference().estimate(sample)
        within = _residuals(sample.x, sample.truth[:, None])
        covariance = within.T @ within / len(within)
        return np.linalg.solve((1 - self.shrinkage) * covariance + self.shrinkage * np.eye(len(slope)), slope)


class HeldFixed:
    """`base` on what is left of y when nuisance columns are known: the label's effect at equal age, head size, ...

    Args:
        base: an estimator.
        columns: of the table, numbers or categories. The label's own column and missing ones are passed over.
    """

    def __init__(self, base: DirectionEstimator, columns: Sequence[str] = ()) -> None:
        self.base, self.columns = base, list(columns)

    def estimate(self, sample: FittingRows) -> np.ndarray:
        """The base estimator's vector on residuals of y."""
        residuals = _residuals(sample.x, nuisance_design(sample, self.columns))
        return self.base.estimate(FittingRows(residuals, sample.truth, sample.table, sample.probe, sample.seed))


class ProjectedOut:
    """`base`, then orthogonal to each nuisance column's own effect on y. Takes away what label and nuisance share."""

    def __init__(self, base: DirectionEstimator, columns: Sequence[str] = ()) -> None:
        self.base, self.columns = base, list(columns)

    def estimate(self, sample: FittingRows) -> np.ndarray:
        """The base estimator's vector less its part in the span of the nuisance effects."""
        design = nuisance_design(sample, self.columns)
        vector = self.base.estimate(sample)
        if design.shape[1] == 0:
            return vector
        # Effects at a fixed label, else the label's own effect is counted as the nuisance's.
        both = np.column_stack([design, sample.truth - sample.truth.mean()])
        effects = np.linalg.lstsq(both, sample.x - sample.x.mean(0), rcond=None)[0][:-1]
        return vector - effects.T @ np.linalg.lstsq(effects.T, vector, rcond=None)[0]


def nuisance_design(sample: FittingRows, columns: Sequence[str]) -> np.ndarray:
    """Design matrix (N, K) of these columns: standardised numbers (missing = mean), categories as 0/1, all centred."""
    parts = []
    for column in columns:
        if column not in sample.table:
            log.info("direction of %s: the table has no %s to hold fixed", sample.probe.column, column)
        elif column != sample.probe.column:
            parts.append(_design(sample.table[column]))
    return np.concatenate([np.zeros((len(sample.x), 0)), *parts], axis=1)


def _design(values: pd.Series) -> np.ndarray:
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.notna().any():
        centred = (numbers - numbers.mean()).fillna(0).to_numpy(np.float64)
        spread = centred.std()
        return centred[:, None] / spread if spread > 0 else np.zeros((len(values), 0))
    dummies = pd.get_dummies(values.astype(str), drop_first=True).to_numpy(np.float64)
    return dummies - dummies.mean(0)


def _residuals(x: np.ndarray, design: np.ndarray) -> np.ndarray:
    centred, design = x - x.mean(0), design - design.mean(0)
    return centred - design @ np.linalg.lstsq(design, centred, rcond=None)[0]


def labelled_rows(table: pd.DataFrame, probe: Probe, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` whose label is known."""
    return rows[np.isfinite(probe.target(table)[rows])]


def find_direction(
    estimator: DirectionEstimator,
    probe: Probe,
    table: pd.DataFrame,
    embeddings: np.ndarray,
    rows: np.ndarray,
    seed: int = 0,
) -> Direction:
    """The direction of `probe` from `rows`, train rows, and nothing else.

    Args:
        embeddings: (N, dim), row i belongs to row i of `table`.

    Raises:
        UserError: too few labels among the rows, or a direction of length zero.
    """
    rows = labelled_rows(table, probe, rows)
    truth, chosen = probe.target(table)[rows], table.iloc[rows]
    why = probe.reason_unusable(truth, chosen["subject"].to_numpy(str), fitting=True)
    if why:
        raise UserError(f"no direction of {probe.column}: the train split has {why}")
    y = embeddings[rows].astype(np.float64)
    mean, std = y.mean(0), y.std(0)
    std = np.where(std > 0, std, 1.0)
    vector = estimator.estimate(FittingRows((y - mean) / std, truth, chosen, probe, seed))
    length = float(np.linalg.norm(vector))
    if not length > 1e-12:
        raise UserError(f"the direction of {probe.column} has length zero: nothing in y goes with it; hold less fixed")
    return Direction(mean, std, vector / length)
