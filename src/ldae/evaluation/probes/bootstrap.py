"""Uncertainty over subjects: whole subjects are drawn with replacement, since scans of one subject are not independent.

A resample is a row of weights, the number of times that each scan's subject was drawn, so that a metric written with
weights is computed for all resamples at once, and two predictors are compared on the same resamples.
"""

from collections.abc import Sequence

import numpy as np


def draw_subject_weights(subjects: Sequence[str], resamples: int, seed: int) -> np.ndarray:
    """(1 + resamples, N) weights: ones for the sample itself, then a row for every resample of its subjects."""
    names, inverse = np.unique(np.asarray(subjects, dtype=str), return_inverse=True)
    share = np.full(len(names), 1 / len(names))
    counts = np.random.default_rng(seed).multinomial(len(names), share, size=resamples)  # (R, S)
    return np.concatenate([np.ones((1, len(inverse))), counts[:, inverse]]).astype(np.float64)


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of resampled values, (R,). Resamples in which the metric is undefined (NaN) are left out."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def summarise(name: str, values: np.ndarray) -> list[tuple[str, float]]:
    """(name, name_low, name_high) of a metric's values on the sample and its resamples, (1 + R,)."""
    low, high = percentile_interval(values[1:])
    return [(name, float(values[0])), (f"{name}_low", low), (f"{name}_high", high)]
