"""95 % intervals by a bootstrap over subjects.

Whole subjects are drawn with replacement, because scans of one subject are not independent. A resample is a row of
weights: how often the subject of each scan was drawn. A metric written with weights is computed for all resamples at
once, and two predictors are compared on the same resamples.
"""

from collections.abc import Sequence

import numpy as np


def draw_subject_weights(subjects: Sequence[str], resamples: int, seed: int) -> np.ndarray:
    """(1 + R, N) weights of N scans: ones for the sample itself, then one row per resample of its subjects."""
    names, inverse = np.unique(np.asarray(subjects, dtype=str), return_inverse=True)
    share = np.full(len(names), 1 / len(names))
    counts = np.random.default_rng(seed).multinomial(len(names), share, size=resamples)  # (R, number of subjects)
    return np.concatenate([np.ones((1, len(inverse))), counts[:, inverse]]).astype(np.float64)


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a metric's values (R,) on the resamples; those where it is undefined (NaN) are ignored."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return float("nan"), float("nan")
    low, high = np.percentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def summarise(name: str, values: np.ndarray) -> list[tuple[str, float]]:
    """`name`, `name_low` and `name_high` of a metric's values (1 + R,) on the sample and its resamples."""
    low, high = percentile_interval(values[1:])
    return [(name, float(values[0])), (f"{name}_low", low), (f"{name}_high", high)]


def summarise_mean(name: str, values: np.ndarray, weights: np.ndarray) -> list[tuple[str, float]]:
    """The same of the mean of values (N,), one per scan, under weights (1 + R, N), of which some may be all 0."""
    with np.errstate(invalid="ignore"):
        return summarise(name, weights @ values / weights.sum(1))
