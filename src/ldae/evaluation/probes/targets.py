"""What a probe predicts (`conf/probe/*.yaml`): a class by logistic regression, a number by ridge regression."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ldae.editing.linear_model import LinearModel
from ldae.evaluation.probes import fitting, scores
from ldae.evaluation.probes.table_features import describe_values

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

FOLDS = 5
MIN_ROWS = 10
Fold = tuple[np.ndarray, np.ndarray]  # positions of the fitting and of the held-out rows


class Probe(ABC):
    """A linear probe of one column of the table.

    Attributes:
        column: the column that it predicts.
        classes: (negative, positive); None for a number.
        strengths: regularisation strengths to choose from, the strongest penalty first.
        tolerance: by how many standard errors the held-out loss of a stronger penalty may exceed the lowest one.
        bias_correction: whether the model also learns to correct its regression to the mean (LinearModel.bias).
        signs: metrics that are compared with the baselines'; 1: higher is better, -1: lower is better.
    """

    column: str
    classes: tuple[str, str] | None
    strengths: list[float]
    tolerance: float
    bias_correction: bool
    signs: dict[str, int]

    def fit(
        self,
        features: np.ndarray,
        truth: np.ndarray,
        subjects: np.ndarray,
        seed: int,
        widths: Sequence[int] | None = None,
    ) -> LinearModel:
        """The probe fitted on these rows, see fitting.fit."""
        return fitting.fit(self, features, truth, subjects, seed, widths)

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
    def estimator(self, strength: float) -> "BaseEstimator":
        """A scikit-learn estimator with this regularisation strength."""

    @abstractmethod
    def folds(self, truth: np.ndarray, subjects: np.ndarray, seed: int) -> Iterable[Fold]:
        """Folds in which no subject is on both sides."""

    @abstractmethod
    def losses(self, model: "BaseEstimator", features: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Loss of a fitted estimator on each row, (N,), by which the regularisation is chosen."""

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
    ):
        """`strengths`: values of scikit-learn's C. `age_window`: largest age difference of a pair, years."""
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

    def estimator(self, strength: float) -> "BaseEstimator":
        """L2-penalised logistic regression with C = strength."""
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=strength, class_weight=self.class_weight, max_iter=2000)

    def folds(self, truth: np.ndarray, subjects: np.ndarray, seed: int) -> Iterable[Fold]:
        """By subject, with about the same share of positives in each; folds without both classes are dropped."""
        from sklearn.model_selection import StratifiedGroupKFold

        smallest = min(len(set(subjects[truth == value])) for value in (0, 1))
        splitter = StratifiedGroupKFold(min(FOLDS, smallest), shuffle=True, random_state=seed)
        for inner, held in splitter.split(truth, truth, subjects):
            if len(set(truth[inner])) == 2 and len(held):
                yield inner, held

    def losses(self, model: "BaseEstimator", features: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Negative log-likelihood, which rewards both the order and the calibration of probabilities."""
        log_odds = model.decision_function(features)
        return np.logaddexp(0, np.where(truth == 1, -log_odds, log_odds))

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
    ):
        """`strengths`: values of ridge's alpha, for standardised features.

        `bias_correction` adds metrics of predictions that are corrected for regression to the mean (LinearModel.bias).
        """
        self.column, self.bias_correction = column, bias_correction
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

    def estimator(self, strength: float) -> "BaseEstimator":
        """Ridge regression with alpha = strength."""
        from sklearn.linear_model import Ridge

        return Ridge(alpha=strength)

    def folds(self, truth: np.ndarray, subjects: np.ndarray, seed: int) -> Iterable[Fold]:
        """By subject."""
        from sklearn.model_selection import GroupKFold

        splitter = GroupKFold(min(FOLDS, len(set(subjects))), shuffle=True, random_state=seed)
        yield from splitter.split(truth, truth, subjects)

    def losses(self, model: "BaseEstimator", features: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Absolute error, whose mean is the main metric."""
        return np.abs(model.predict(features) - truth)

    def scores(
        self, truth: np.ndarray, prediction: np.ndarray, age: np.ndarray, weights: np.ndarray
    ) -> dict[str, np.ndarray]:
        """All numeric metrics."""
        return scores.numeric_scores(truth, prediction, weights)
