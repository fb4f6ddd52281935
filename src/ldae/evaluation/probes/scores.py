"""Metrics of a binary and of a numeric prediction, computed for many weightings of the scans at once.

`weights` is (R, N): row r counts how often resample r contains each scan (bootstrap.py). Every metric is (R,). It is
NaN where it is undefined, for example if a resample has only one class. With unit weights the metrics equal
scikit-learn's.
"""

import numpy as np

# 1: higher is better, -1: lower is better. The sign of differences between predictors: positive = embedding better.
BINARY_SIGNS = {
    "accuracy": 1, "balanced_accuracy": 1, "sensitivity": 1, "specificity": 1, "f1": 1, "mcc": 1,
    "auc": 1, "pr_auc": 1, "auc_age_adjusted": 1, "brier": -1, "calibration_error": -1,
}  # fmt: skip
NUMERIC_SIGNS = {"mae": -1, "rmse": -1, "r2": 1, "pearson": 1}
MIN_PAIRS = 20


def binary_scores(truth: np.ndarray, probability: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """All metrics of a classifier, (R,) each.

    Args:
        truth: (N,) in {0, 1}, 1 = positive class.
        probability: (N,) of the positive class. Metrics that need a decision threshold it at 0.5.
    """
    positive, predicted = truth == 1, probability >= 0.5
    tp, fn = weights @ (positive & predicted), weights @ (positive & ~predicted)
    fp, tn = weights @ (~positive & predicted), weights @ (~positive & ~predicted)
    with np.errstate(divide="ignore", invalid="ignore"):
        sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
        norm = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        return {
            "accuracy": (tp + tn) / weights.sum(1),
            "balanced_accuracy": (sensitivity + specificity) / 2,
            "sensitivity": sensitivity,
            "specificity": specificity,
            "f1": 2 * tp / (2 * tp + fp + fn),
            "mcc": np.where(norm > 0, (tp * tn - fp * fn) / norm, 0.0),
            "auc": auc(truth, probability, weights),
            "pr_auc": average_precision(truth, probability, weights),
            "brier": weights @ (probability - truth) ** 2 / weights.sum(1),
            "calibration_error": calibration_error(truth, probability, weights),
            "tn": tn, "fp": fp, "fn": fn, "tp": tp,
        }  # fmt: skip


def _weights_by_score(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the positives and of the negatives at every distinct score, ascending: two (R, G) arrays."""
    order = np.argsort(score, kind="stable")
    _, starts = np.unique(score[order], return_index=True)
    positive = np.add.reduceat(weights[:, order] * (truth[order] == 1), starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * (truth[order] == 0), starts, axis=1)
    return positive, negative


def auc(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting half."""
    positive, negative = _weights_by_score(truth, score, weights)
    below = np.cumsum(negative, 1) - negative / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def average_precision(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve: the sum over thresholds of (step in recall) x precision."""
    positive, negative = (part[:, ::-1] for part in _weights_by_score(truth, score, weights))
    hits, predicted = np.cumsum(positive, 1), np.cumsum(positive + negative, 1)
    precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (positive * precision).sum(1) / positive.sum(1)


def calibration_error(truth: np.ndarray, probability: np.ndarray, weights: np.ndarray, bins: int = 10) -> np.ndarray:
    """Expected calibration error: |observed - predicted frequency|, averaged over bins of equal width."""
    index = np.minimum((probability * bins).astype(int), bins - 1)
    member = np.eye(bins)[index]  # (N, bins)
    difference = np.abs(weights @ (member * (truth - probability)[:, None]))  # times the weight of the bin
    return difference.sum(1) / weights.sum(1)


def age_adjusted_auc(
    truth: np.ndarray, score: np.ndarray, age: np.ndarray, weights: np.ndarray, window: float
) -> np.ndarray:
    """The AUC among (positive, negative) pairs whose ages differ by at most `window` years.

    It is the probability that, of two subjects of about the same age, the positive one has the higher score: the effect
    of age is held fixed without a model of it. Age alone scores near 0.5. Scans without an age form no pair. NaN if
    there are fewer than `MIN_PAIRS` pairs.
    """
    first, second = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
    matched = np.abs(age[first, None] - age[None, second]) <= window  # False where an age is NaN
    if matched.sum() < MIN_PAIRS:
        return np.full(len(weights), np.nan)
    difference = score[first, None] - score[None, second]
    ordered = matched * ((difference > 0) + 0.5 * (difference == 0))
    one, other = weights[:, first], weights[:, second]
    with np.errstate(divide="ignore", invalid="ignore"):
        return ((one @ ordered) * other).sum(1) / ((one @ matched.astype(float)) * other).sum(1)


def numeric_scores(truth: np.ndarray, prediction: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """MAE and RMSE (in the unit of `truth`), R2 and Pearson's r, (R,) each; r is NaN for a constant prediction."""
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
    """Weighted Pearson correlation, (R,); NaN if either is constant."""
    # Centred before the weights are applied, because the one-pass formula loses digits otherwise.
    first, second = first - first.mean(), second - second.mean()
    total = weights.sum(1)
    a, b = weights @ first / total, weights @ second / total
    covariance = weights @ (first * second) / total - a * b
    variances = (weights @ first**2 / total - a**2) * (weights @ second**2 / total - b**2)
    scale = (first**2).mean() * (second**2).mean()
    defined = variances > 1e-12 * scale if scale > 0 else np.zeros_like(variances, dtype=bool)
    norm = np.sqrt(np.maximum(variances, 1e-300))
    return np.divide(covariance, norm, out=np.full_like(variances, np.nan), where=defined)
