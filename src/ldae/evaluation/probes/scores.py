"""Metrics of a binary and of a numeric prediction, computed for many weightings of the scans at once.

`weights` is (R, N): row r counts scan i as often as resample r holds it (see bootstrap.py); every metric is (R,).
Undefined values (a class absent from a resample) are NaN. With unit weights they equal scikit-learn's.
"""

import numpy as np

# +1: higher is better, -1: lower is better. Differences between predictors are signed so that positive = ours better.
BINARY = {
    "accuracy": 1, "balanced_accuracy": 1, "sensitivity": 1, "specificity": 1, "f1": 1, "mcc": 1,
    "auc": 1, "pr_auc": 1, "auc_age_adjusted": 1, "brier": -1, "calibration_error": -1,
}  # fmt: skip
NUMERIC = {"mae": -1, "rmse": -1, "r2": 1, "pearson": 1}
MIN_PAIRS = 20


def binary_scores(truth: np.ndarray, probability: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """All metrics of a classifier. truth: (N,) in {0, 1}, 1 = positive; probability: (N,) of the positive class.

    Threshold metrics cut at 0.5. `tn, fp, fn, tp` is the confusion matrix in scans.
    """
    positive, called = truth == 1, probability >= 0.5
    tp, fn = weights @ (positive & called), weights @ (positive & ~called)
    fp, tn = weights @ (~positive & called), weights @ (~positive & ~called)
    with np.errstate(divide="ignore", invalid="ignore"):
        sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
        spread = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        return {
            "accuracy": (tp + tn) / weights.sum(1),
            "balanced_accuracy": (sensitivity + specificity) / 2,
            "sensitivity": sensitivity,
            "specificity": specificity,
            "f1": 2 * tp / (2 * tp + fp + fn),
            "mcc": np.where(spread > 0, (tp * tn - fp * fn) / spread, 0.0),
            "auc": auc(truth, probability, weights),
            "pr_auc": average_precision(truth, probability, weights),
            "brier": weights @ (probability - truth) ** 2 / weights.sum(1),
            "calibration_error": calibration_error(truth, probability, weights),
            "tn": tn, "fp": fp, "fn": fn, "tp": tp,
        }  # fmt: skip


def _by_score(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of positives and of negatives at every distinct score, ascending: two (R, G) arrays."""
    order = np.argsort(score, kind="stable")
    _, starts = np.unique(score[order], return_index=True)
    positive = np.add.reduceat(weights[:, order] * (truth[order] == 1), starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * (truth[order] == 0), starts, axis=1)
    return positive, negative


def auc(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting half."""
    positive, negative = _by_score(truth, score, weights)
    below = np.cumsum(negative, 1) - negative / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def average_precision(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve as a sum over thresholds of (step in recall) x precision."""
    positive, negative = (part[:, ::-1] for part in _by_score(truth, score, weights))
    hits, called = np.cumsum(positive, 1), np.cumsum(positive + negative, 1)
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (positive * precision).sum(1) / positive.sum(1)


def calibration_error(truth: np.ndarray, probability: np.ndarray, weights: np.ndarray, bins: int = 10) -> np.ndarray:
    """Expected calibration error: |observed - predicted frequency| averaged over equal-width bins of probability."""
    index = np.minimum((probability * bins).astype(int), bins - 1)
    member = np.eye(bins)[index]  # (N, bins)
    gap = np.abs(weights @ (member * (truth - probability)[:, None]))  # bin weight x |observed - predicted|
    return gap.sum(1) / weights.sum(1)


def age_adjusted_auc(
    truth: np.ndarray, score: np.ndarray, age: np.ndarray, weights: np.ndarray, window: float
) -> np.ndarray:
    """The AUC among (positive, negative) pairs whose ages differ by at most `window` years.

    The probability that, of two people of about the same age, the diseased one scores higher: what age itself tells is
    held fixed without fitting anything. Age alone scores near 0.5. Scans without an age are in no pair; fewer than
    `MIN_PAIRS` pairs say nothing (NaN).
    """
    first, second = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
    matched = np.abs(age[first, None] - age[None, second]) <= window  # False where an age is NaN
    if matched.sum() < MIN_PAIRS:
        return np.full(len(weights), np.nan)
    gap = score[first, None] - score[None, second]
    right = matched * ((gap > 0) + 0.5 * (gap == 0))
    one, other = weights[:, first], weights[:, second]
    with np.errstate(divide="ignore", invalid="ignore"):
        return ((one @ right) * other).sum(1) / ((one @ matched.astype(float)) * other).sum(1)


def numeric_scores(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """MAE, RMSE (in the unit of `truth`), R2 and Pearson's r. r is undefined for a constant prediction."""
    total = weights.sum(1)
    error = prediction - truth
    square = weights @ error**2 / total
    centred = truth - truth.mean()
    variance = weights @ centred**2 / total - (weights @ centred / total) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "mae": weights @ np.abs(error) / total,
            "rmse": np.sqrt(square),
            "r2": 1 - square / variance,
            "pearson": pearson(truth, prediction, weights),
        }


def pearson(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted Pearson correlation; NaN when either is constant."""
    # Centred once before the weights come in: the one-pass formula then loses no digits.
    first, second = first - first.mean(), second - second.mean()
    total = weights.sum(1)
    a, b = weights @ first / total, weights @ second / total
    covariance = weights @ (first * second) / total - a * b
    spread = (weights @ first**2 / total - a**2) * (weights @ second**2 / total - b**2)
    scale = (first**2).mean() * (second**2).mean()
    defined = spread > 1e-12 * scale if scale > 0 else np.zeros_like(spread, dtype=bool)
    return np.divide(covariance, np.sqrt(np.maximum(spread, 1e-300)), out=np.full_like(spread, np.nan), where=defined)
