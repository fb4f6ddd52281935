"""Numbers that describe an effect: slope and rank correlation of a dose-response, medians, correlation of maps."""

import numpy as np


def slope(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Least-squares slope of each row of y (N, A) over x (A,), (N,)."""
    centred = x - x.mean()
    return (y - y.mean(1, keepdims=True)) @ centred / (centred @ centred)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row of y (N, A) with x (A,), (N,); 0 for a constant or undefined row."""
    from scipy.stats import rankdata

    a = rankdata(x) - (len(x) + 1) / 2
    b = rankdata(y, axis=1, nan_policy="omit") - (len(x) + 1) / 2
    norm = np.sqrt((a @ a) * (b * b).sum(1))
    defined = np.isfinite(norm) & (norm > 0)
    return np.divide(b @ a, norm, out=np.zeros(len(y)), where=defined)


def weighted_median(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Medians (R,) of values (N,) under integer weights (R, N); NaN values are ignored."""
    kept = np.isfinite(values)
    values, weights = values[kept], weights[:, kept].astype(int)
    return np.array([np.median(np.repeat(values, row)) if row.sum() else np.nan for row in weights])


def correlation(first: np.ndarray, second: np.ndarray, mask: np.ndarray) -> float:
    """Pearson's r of two difference maps (X, Y, Z) inside a mask; NaN if either is constant there."""
    a, b = first[mask].astype(np.float64), second[mask].astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 1e-12 else float("nan")
