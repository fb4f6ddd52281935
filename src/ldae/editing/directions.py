"""Estimates the direction in y along which a label increases (direction.py), from training rows.

The vector that predicts a label best (the probe's weights w, as published) is not the vector that changes with it (the
pattern cov(y) w; Haufe et al. 2014, doi 10.1016/j.neuroimage.2013.10.067). Edits need the latter. In a cohort, other
variables change along with a label, such as age with diagnosis: `HeldFixed` and `ProjectedOut` remove their effect.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import pandas as pd

from ldae.editing.direction import Direction
from ldae.editing.linear_model import LinearModel
from ldae.editing.units import AlphaUnit, Calibration, TrainingDistance
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

TRAINING_DISTANCE = TrainingDistance()
NEGLIGIBLE = 1e-12


class FeatureScaling(Protocol):
    """How a probe scales y; `conf/probe_scaling` names the implementations."""

    def divide_features(self, features: np.ndarray) -> np.ndarray:
        """(D,) divisors of features (N, D)."""
        ...


class Probe(Protocol):
    """What a direction needs of a linear probe; `conf/probe` names the implementations."""

    column: str
    scaling: FeatureScaling

    def target(self, table: pd.DataFrame) -> np.ndarray:
        """The label of every row, (N,): 0/1 or a number, NaN where it is unknown."""
        ...

    def reason_unusable(self, truth: np.ndarray, subjects: np.ndarray, fitting: bool) -> str | None:
        """Reason these rows cannot be used, or None."""
        ...

    def fit(self, features: np.ndarray, truth: np.ndarray, subjects: np.ndarray, seed: int) -> LinearModel:
        """The probe fitted on features (N, D) and labels (N,), its penalty chosen by folds over subjects (N,)."""
        ...


@dataclass(frozen=True)
class FittingRows:
    """The rows that a direction is estimated from.

    Attributes:
        x: (N, dim) float64, standardised y.
        truth: (N,), labels: 0/1 or a number.
        table: the rows of the table.
        probe: the label's probe.
        seed: of the probe's folds.
    """

    x: np.ndarray
    truth: np.ndarray
    table: pd.DataFrame
    probe: Probe
    seed: int


class DirectionEstimator(Protocol):
    """Estimates a vector (dim,), of any length, from the fitting rows.

    Implementations are plain classes: Hydra would pass a nested dataclass on as a config.
    """

    def estimate(self, sample: FittingRows) -> np.ndarray: ...


class Weights:
    """The probe's weights w, as published."""

    def estimate(self, sample: FittingRows) -> np.ndarray:
        """w of the probe fitted on standardised y."""
        model = sample.probe.fit(sample.x, sample.truth, sample.table["subject"].to_numpy(str), sample.seed)
        # The probe standardises its input again, and residuals do not have unit variance: convert to weights of x.
        return model.coef / model.std


class Pattern:
    """cov(y) w: how y changes with the probe's decision (Haufe et al. 2014)."""

    def estimate(self, sample: FittingRows) -> np.ndarray:
        """cov(x) w."""
        centred = sample.x - sample.x.mean(0)
        return centred.T @ (centred @ Weights().estimate(sample)) / len(centred)


class MeanDifference:
    """Difference of the class means; for a numeric label cov(y, label), which is the same up to length."""

    def estimate(self, sample: FittingRows) -> np.ndarray:
        """cov(x, truth)."""
        return (sample.x - sample.x.mean(0)).T @ (sample.truth - sample.truth.mean()) / len(sample.x)


class Shrunken:
    """Between weights and mean difference: ((1 - s) W + s I)^-1 cov(y, label), W the covariance within a label.

    Args:
        shrinkage: s in (0, 1]; 1 gives MeanDifference, towards 0 the weights of linear discriminant analysis.
    """

    def __init__(self, shrinkage: float = 0.5) -> None:
        if not 0 < shrinkage <= 1:
            raise UserError(f"direction.shrinkage={shrinkage}: must be more than 0 and at most 1")
        self.shrinkage = shrinkage

    def estimate(self, sample: FittingRows) -> np.ndarray:
        """The vector above."""
        difference = MeanDifference().estimate(sample)
        within = _residuals(sample.x, sample.truth[:, None])
        covariance = within.T @ within / len(within)
        return np.linalg.solve((1 - self.shrinkage) * covariance + self.shrinkage * np.eye(len(difference)), difference)


class HeldFixed:
    """`base` estimated on the residuals of y given nuisance columns: the label's effect at equal age, head size, ...

    Args:
        base: an estimator.
        columns: of the table, numeric or categorical. The label's own column and missing columns are ignored.
    """

    def __init__(self, base: DirectionEstimator, columns: Sequence[str] = ()) -> None:
        self.base, self.columns = base, list(columns)

    def estimate(self, sample: FittingRows) -> np.ndarray:
        """The base estimator's vector on residuals of y."""
        return self.base.estimate(replace(sample, x=_residuals(sample.x, nuisance_design(sample, self.columns))))


class ProjectedOut:
    """`base`, made orthogonal to each nuisance column's own effect on y.

    It removes what label and nuisance share, whereas `HeldFixed` estimates the label's effect at a fixed nuisance.

    Args:
        base, columns: as in `HeldFixed`.
    """

    def __init__(self, base: DirectionEstimator, columns: Sequence[str] = ()) -> None:
        self.base, self.columns = base, list(columns)

    def estimate(self, sample: FittingRows) -> np.ndarray:
        """The base estimator's vector without its component in the span of the nuisance effects."""
        design = nuisance_design(sample, self.columns)
        vector = self.base.estimate(sample)
        if design.shape[1] == 0:
            return vector
        # Effects at a fixed label: otherwise the label's own effect would be attributed to the nuisance.
        both = np.column_stack([design, sample.truth - sample.truth.mean()])
        effects = np.linalg.lstsq(both, sample.x - sample.x.mean(0), rcond=None)[0][:-1]
        return vector - effects.T @ np.linalg.lstsq(effects.T, vector, rcond=None)[0]


def nuisance_design(sample: FittingRows, columns: Sequence[str]) -> np.ndarray:
    """Centred design matrix (N, K) of these columns: standardised numbers (missing = mean), categories as 0/1."""
    parts = []
    for column in columns:
        if column not in sample.table:
            log.info("direction of %s: the table has no column %s to hold fixed", sample.probe.column, column)
        elif column != sample.probe.column:
            parts.append(_design(sample.table[column]))
    return np.concatenate([np.zeros((len(sample.x), 0)), *parts], axis=1)


def _design(values: pd.Series) -> np.ndarray:
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.notna().any():
        centred = (numbers - numbers.mean()).fillna(0).to_numpy(np.float64)
        std = centred.std()
        return centred[:, None] / std if std > 0 else np.zeros((len(values), 0))
    dummies = pd.get_dummies(values.astype(str), drop_first=True).to_numpy(np.float64)
    return dummies - dummies.mean(0)


def _residuals(x: np.ndarray, design: np.ndarray) -> np.ndarray:
    """Residuals of x (N, dim) after linear regression on the design (N, K)."""
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
    alpha: AlphaUnit = TRAINING_DISTANCE,
) -> Direction:
    """The direction of the label of `probe`, estimated and calibrated on the labelled ones of `rows` (training rows).

    Args:
        embeddings: (N, dim), row i belongs to row i of `table`.
        alpha: the unit of alpha.

    Raises:
        UserError: too few labels among the rows, or a direction of length zero.
    """
    rows = labelled_rows(table, probe, rows)
    truth, chosen = probe.target(table)[rows], table.iloc[rows]
    reason = probe.reason_unusable(truth, chosen["subject"].to_numpy(str), fitting=True)
    if reason:
        raise UserError(f"no direction of {probe.column}: the train split has {reason}")
    y = embeddings[rows].astype(np.float64)
    mean, std = y.mean(0), probe.scaling.divide_features(y)
    sample = FittingRows((y - mean) / std, truth, chosen, probe, seed)
    vector = estimator.estimate(sample)
    length = float(np.linalg.norm(vector))
    if not length > NEGLIGIBLE:
        raise UserError(
            f"the direction of {probe.column} has length zero: y does not change with it; hold fewer columns fixed"
        )
    unit = vector / length
    readout = probe.fit(y, truth, chosen["subject"].to_numpy(str), seed)
    calibration = calibrate(sample, unit, std, readout)
    return Direction(mean, std, unit, alpha.scale(calibration, len(unit)), calibration, readout)


def calibrate(sample: FittingRows, unit: np.ndarray, std: np.ndarray, readout: LinearModel) -> Calibration:
    """How far apart the fitting rows lie along the unit vector.

    Classes: the distance of their means along it. A number: the length along it that moves the probe's read-out by 1.
    The read-out is corrected for regression to the mean, if the probe learns that (`bias_correction`). Without it, a
    ridge regression reads ten years as fewer, and an edit by ten years goes further than ten years of ageing do.

    Args:
        unit, std: (dim,), see Direction.
        readout: the probe, fitted on y of these rows.

    Raises:
        UserError: the label does not change along the direction.
    """
    column, truth = sample.probe.column, sample.truth
    if readout.classes is not None:
        along = sample.x @ unit
        found = Calibration(column, float(along[truth == 1].mean() - along[truth == 0].mean()), readout.classes)
    else:
        slope = readout.slope_along(std * unit)
        found = Calibration(column, 1 / slope if abs(slope) > NEGLIGIBLE else 0.0, deviation=float(truth.std()))
    if not abs(found.length) > NEGLIGIBLE:
        raise UserError(f"the direction of {column} cannot be calibrated: {column} does not change along it")
    if found.length < 0:
        log.warning("%s falls along its direction in the training scans: other columns hide its effect", column)
    return found
