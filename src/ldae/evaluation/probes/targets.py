"""What a probe predicts (`conf/probe/*.yaml`): a class by logistic regression, a number by ridge regression."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd

from ldae.editing.linear_model import LinearModel
from ldae.evaluation.probes import fitting, scores
from ldae.evaluation.probes.blocks import Block
from ldae.evaluation.probes.scaling import OneScale, Scaling
from ldae.evaluation.probes.solvers import Fit, logistic_path, ridge_path
from ldae.evaluation.probes.table_features import describe_values

FOLDS = 5
MIN_ROWS = 10
REMEMBERED = 8  # divisions into folds
Fold = tuple[np.ndarray, np.ndarray]  # positions of the fitting and of the held-out rows


class Probe(ABC):
    """A linear probe of one column of the table.

    Attributes:
        column: the column that it predicts.
        classes: (negative, positive); None for a number.
        strengths: regularisation strengths to choose from, the strongest penalty first.
        tolerance: by how many standard errors the held-out loss of a stronger penalty may exceed the lowest one.
        bias_correction: whether the model also learns to correct its regression to the mean (LinearModel.bias).
        scaling: of the features before the penalty.
        signs: metrics that are compared with the baselines'; 1: higher is better, -1: lower is better.
    """

    column: str
    classes: tuple[str, str] | None
    strengths: list[float]
    tolerance: float
    bias_correction: bool
    scaling: Scaling
    signs: dict[str, int]

    def fit(
        self,
        features: np.ndarray | Sequence[Block],
        truth: np.ndarray,
        subjects: np.ndarray,
        seed: int,
    ) -> LinearModel:
        """The probe fitted on these rows, see fitting.fit."""
        return fitting.fit(self, features, truth, subjects, seed)

    @abstractmethod
    def target(self, table: pd.DataFrame) -> np.ndarray:
        """The label of every row, (N,): 0 or 1, or a number; NaN where it is unknown or the column is missing."""

    @abstractmethod
    def reason_unusable(self, truth: np.ndarray, subjects: np.ndarray, fitting: bool) -> str | None:
        """Reason why these labelled rows cannot be used for fitting, or for testing; None if they can."""

    @abstractmethod
    def describe_remedy(self, table: pd.DataFrame, name: str) -> str:
        """What the table has in place of usable labels, and which keys of the probe `name` choose other ones."""

    @abstractmethod
    def solve(self, features: np.ndarray, truth: np.ndarray, strengths: Sequence[float]) -> list[Fit]:
        """Slopes and intercept for each of these regularisation strengths, the strongest penalty first."""

    @abstractmethod
    def folds(self, truth: np.ndarray, subjects: np.ndarray, seed: int) -> Iterable[Fold]:
        """Folds in which no subject is on both sides."""

    @abstractmethod
    def losses(self, decision: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Loss on each row, (N,), by which the regularisation is chosen.

        Args:
            decision: (N,), features times slopes plus intercept.
        """

    @abstractmethod
    def scores(
        self, truth: np.ndarray, prediction: np.ndarray, age: np.ndarray, weights: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Every metric of scores.py, (R,) each; weights: (R, N)."""


class Classification(Probe):
    """`positive` against `negative` in a column of the table; scans with any other value are not used.

    `positive` is the class to which sensitivity, F1 and PR-AUC refer: AD, the disease, in `probe=diagnosis`.
    """

    signs = scores.BINARY_SIGNS
    tolerance = 1.0  # a stronger penalty keeps the order of the scans, which is what matters here
    bias_correction = False

    def __init__(
        self,
        column: str,
        positive: str,
        negative: str,
        strengths: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0),
        class_weight: str | None = None,
        age_window: float = 3.0,
        scaling: Scaling | None = None,
    ):
        """`strengths`: values of scikit-learn's C. `age_window`: largest age difference of a pair, years.

        `scaling`: of the features, by default `OneScale`.
        """
        self.scaling = scaling or OneScale()
        self.column, self.classes = column, (negative, positive)
        self.strengths, self.class_weight, self.age_window = sorted(strengths), class_weight, age_window

    def target(self, table: pd.DataFrame) -> np.ndarray:
        """(N,): 1 positive, 0 negative, otherwise NaN."""
        if self.column not in table:
            return np.full(len(table), np.nan)
        negative, positive = self.classes
        found = table[self.column].astype(str).to_numpy()
        return np.where(found == positive, 1.0, np.where(found == negative, 0.0, np.nan))

    def reason_unusable(self, truth: np.ndarray, subjects: np.ndarray, fitting: bool) -> str | None:
        """Fitting needs two subjects of each class, testing one."""
        needed = 2 if fitting else 1
        for value, name in enumerate(self.classes):
            count = len(set(subjects[truth == value]))
            if count < needed:
                return f"{count} subjects with {self.column} = {name}, at least {needed} needed"
        return None

    def describe_remedy(self, table: pd.DataFrame, name: str) -> str:
        """The values of the column, and the keys that choose others."""
        if self.column not in table:
            return f"{describe_values(table, self.column)}; set probe.{name}.column"
        return f"{describe_values(table, self.column)}; set probe.{name}.positive and probe.{name}.negative"

    def solve(self, features: np.ndarray, truth: np.ndarray, strengths: Sequence[float]) -> list[Fit]:
        """L2-penalised logistic regression, scikit-learn's C being the strength."""
        from sklearn.utils.class_weight import compute_sample_weight

        return logistic_path(features, truth, strengths, compute_sample_weight(self.class_weight, truth))

    def folds(self, truth: np.ndarray, subjects: np.ndarray, seed: int) -> Iterable[Fold]:
        """By subject, with about the same share of positives in each; folds without both classes are dropped."""
        return _stratified_folds(tuple(truth.tolist()), tuple(subjects.tolist()), seed)

    def losses(self, decision: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Negative log-likelihood, which rewards both the order and the calibration of probabilities."""
        return np.logaddexp(0, np.where(truth == 1, -decision, decision))

    def scores(
        self, truth: np.ndarray, prediction: np.ndarray, age: np.ndarray, weights: np.ndarray
    ) -> dict[str, np.ndarray]:
        """All binary metrics; `auc_age_adjusted` only if enough pairs have ages."""
        found = scores.binary_scores(truth, prediction, weights)
        adjusted = scores.age_adjusted_auc(truth, prediction, age, weights, self.age_window)
        return found | ({"auc_age_adjusted": adjusted} if np.isfinite(adjusted[0]) else {})


class Regression(Probe):
    """A numeric column of the table; scans without a value are not used."""

    signs = scores.NUMERIC_SIGNS
    tolerance = 0.0  # a stronger penalty pulls every prediction to the mean
    classes = None

    def __init__(
        self,
        column: str,
        strengths: Sequence[float] = (10.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5),
        bias_correction: bool = False,
        scaling: Scaling | None = None,
    ):
        """`strengths`: values of ridge's alpha. `scaling`: of the features, by default `OneScale`.

        `bias_correction` adds metrics of predictions that are corrected for regression to the mean (LinearModel.bias).
        """
        self.column, self.bias_correction, self.scaling = column, bias_correction, scaling or OneScale()
        self.strengths = sorted(strengths, reverse=True)

    def target(self, table: pd.DataFrame) -> np.ndarray:
        """(N,) float, NaN where missing."""
        if self.column not in table:
            return np.full(len(table), np.nan)
        return pd.to_numeric(table[self.column], errors="coerce").to_numpy(np.float64)

    def reason_unusable(self, truth: np.ndarray, subjects: np.ndarray, fitting: bool) -> str | None:
        """Fitting needs ten scans of at least two subjects; fitting and testing need two different values."""
        if fitting and (len(truth) < MIN_ROWS or len(set(subjects)) < 2):
            return f"{len(truth)} scans with a {self.column}, at least {MIN_ROWS} of two subjects needed"
        if len(np.unique(truth)) < 2:
            return f"fewer than two different values of {self.column}"
        return None

    def describe_remedy(self, table: pd.DataFrame, name: str) -> str:
        """The values of the column, and the key that chooses another."""
        return f"{describe_values(table, self.column)}; set probe.{name}.column"

    def solve(self, features: np.ndarray, truth: np.ndarray, strengths: Sequence[float]) -> list[Fit]:
        """Ridge regression, scikit-learn's alpha being the strength."""
        return ridge_path(features, truth, strengths)

    def folds(self, truth: np.ndarray, subjects: np.ndarray, seed: int) -> Iterable[Fold]:
        """By subject."""
        return _folds_by_subject(tuple(subjects.tolist()), seed)

    def losses(self, decision: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Absolute error, whose mean is the main metric."""
        return np.abs(decision - truth)

    def scores(
        self, truth: np.ndarray, prediction: np.ndarray, age: np.ndarray, weights: np.ndarray
    ) -> dict[str, np.ndarray]:
        """All numeric metrics."""
        return scores.numeric_scores(truth, prediction, weights)


@lru_cache(REMEMBERED)
def _stratified_folds(truth: tuple[float, ...], subjects: tuple[str, ...], seed: int) -> Sequence[Fold]:
    """Folds by subject with about the same share of positives; remembered, because every predictor has the same."""
    from sklearn.model_selection import StratifiedGroupKFold

    labels, groups = np.array(truth), np.array(subjects)
    smallest = min(len(set(groups[labels == value])) for value in (0, 1))
    splitter = StratifiedGroupKFold(min(FOLDS, smallest), shuffle=True, random_state=seed)
    folds = splitter.split(labels, labels, groups)
    return [(inner, held) for inner, held in folds if len(set(labels[inner])) == 2 and len(held)]


@lru_cache(REMEMBERED)
def _folds_by_subject(subjects: tuple[str, ...], seed: int) -> Sequence[Fold]:
    """Folds by subject; remembered, because every predictor has the same."""
    from sklearn.model_selection import GroupKFold

    groups = np.array(subjects)
    splitter = GroupKFold(min(FOLDS, len(set(subjects))), shuffle=True, random_state=seed)
    return list(splitter.split(groups, groups, groups))
