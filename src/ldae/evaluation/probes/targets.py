"""What a probe predicts (`conf/probe/*.yaml`): a class by logistic regression, a number by ridge regression."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from ldae.editing.linear_model import LinearModel
from ldae.evaluation.probes import fitting, scores

FOLDS = 5
MIN_ROWS = 10


class Probe:
    """What both kinds of probe share: how they are fitted."""

    def fit(self, features: np.ndarray, truth: np.ndarray, subjects: np.ndarray, seed: int) -> LinearModel:
        """The probe fitted on features (N, D) and truth (N,), its penalty chosen by folds over subjects (N,)."""
        return fitting.fit(self, features, truth, subjects, seed)


class Classification(Probe):
    """`positive` against `negative` in a column of the table; scans with any other value are left out.

    `positive` is the class that sensitivity, F1 and PR-AUC speak of: AD, the disease, in `probe=diagnosis`.
    """

    better = scores.BINARY
    primary = "auc"
    tolerance = 1.0  # a stronger penalty keeps the order of people, which is what is asked for
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
        """`strengths` are values of scikit-learn's C; `age_window` (years) matches pairs in the age-adjusted AUC."""
        self.column, self.classes = column, (negative, positive)
        self.strengths, self.class_weight, self.age_window = sorted(strengths), class_weight, age_window

    def target(self, table: pd.DataFrame) -> np.ndarray:
        """(N,): 1 positive, 0 negative, NaN left out. All NaN when the table has no such column."""
        if self.column not in table:
            return np.full(len(table), np.nan)
        negative, positive = self.classes
        found = table[self.column].astype(str).to_numpy()
        return np.where(found == positive, 1.0, np.where(found == negative, 0.0, np.nan))

    def reason_unusable(self, truth: np.ndarray, subjects: np.ndarray, fitting: bool) -> str | None:
        """Why these rows do not do, or None. Fitting needs two subjects of each class, testing one scan of each."""
        needed = 2 if fitting else 1
        for value, name in enumerate(self.classes):
            count = len(set(subjects[truth == value]))
            if count < needed:
                return f"{count} subjects with {self.column} = {name}, at least {needed} needed"
        return None

    def estimator(self, strength: float) -> Any:
        """L2-penalised logistic regression with C = strength."""
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=strength, class_weight=self.class_weight, max_iter=2000)

    def folds(self, truth: np.ndarray, subjects: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Grouped by subject, with about the same share of positives; folds that lack a class are dropped."""
        from sklearn.model_selection import StratifiedGroupKFold

        smallest = min(len(set(subjects[truth == value])) for value in (0, 1))
        splitter = StratifiedGroupKFold(min(FOLDS, smallest), shuffle=True, random_state=seed)
        for inner, held in splitter.split(truth, truth, subjects):
            if len(set(truth[inner])) == 2 and len(held):
                yield inner, held

    def losses(self, model: Any, features: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Negative log-likelihoods, (N,): they reward order and calibration alike."""
        log_odds = model.decision_function(features)
        return np.logaddexp(0, np.where(truth == 1, -log_odds, log_odds))

    def scores(
        self, truth: np.ndarray, prediction: np.ndarray, age: np.ndarray, weights: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Every metric of scores.py, (R,) each; `auc_age_adjusted` where ages allow a pair."""
        found = scores.binary_scores(truth, prediction, weights)
        adjusted = scores.age_adjusted_auc(truth, prediction, age, weights, self.age_window)
        return found | ({"auc_age_adjusted": adjusted} if np.isfinite(adjusted[0]) else {})


class Regression(Probe):
    """A numeric column of the table; scans without a value are left out."""

    better = scores.NUMERIC
    primary = "mae"
    tolerance = 0.0  # a stronger penalty pulls every number to the mean
    classes = None

    def __init__(
        self,
        column: str,
        strengths: Sequence[float] = (10.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5),
        bias_correction: bool = False,
    ):
        """`strengths` are values of ridge's alpha, for standardised features.

        `bias_correction` adds metrics of predictions without the regression's pull to the mean, see linear.py.
        """
        self.column, self.bias_correction = column, bias_correction
        self.strengths = sorted(strengths, reverse=True)

    def target(self, table: pd.DataFrame) -> np.ndarray:
        """(N,) float, NaN where missing. All NaN when the table has no such column."""
        if self.column not in table:
            return np.full(len(table), np.nan)
        return pd.to_numeric(table[self.column], errors="coerce").to_numpy(np.float64)

    def reason_unusable(self, truth: np.ndarray, subjects: np.ndarray, fitting: bool) -> str | None:
        """Why these rows do not do, or None. Fitting needs ten scans of two subjects, testing two different values."""
        if fitting and (len(truth) < MIN_ROWS or len(set(subjects)) < 2):
            return f"{len(truth)} scans with a {self.column}, at least {MIN_ROWS} of two subjects needed"
        if len(np.unique(truth)) < 2:
            return f"fewer than two different values of {self.column}"
        return None

    def estimator(self, strength: float) -> Any:
        """Ridge regression with alpha = strength."""
        from sklearn.linear_model import Ridge

        return Ridge(alpha=strength)

    def folds(self, truth: np.ndarray, subjects: np.ndarray, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Grouped by subject."""
        from sklearn.model_selection import GroupKFold

        splitter = GroupKFold(min(FOLDS, len(set(subjects))), shuffle=True, random_state=seed)
        yield from splitter.split(truth, truth, subjects)

    def losses(self, model: Any, features: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """Absolute errors, (N,): their mean is the metric that is reported first."""
        return np.abs(model.predict(features) - truth)

    def scores(
        self, truth: np.ndarray, prediction: np.ndarray, age: np.ndarray, weights: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Every metric of scores.py, (R,) each."""
        return scores.numeric_scores(truth, prediction, weights)
