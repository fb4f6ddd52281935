"""Ridge and logistic regression for a whole list of penalties at once.

They find the same minimum as scikit-learn's Ridge and LogisticRegression, in a tenth of the time on some hundred scans:
a probe is fitted for every penalty in every fold.
"""

from collections.abc import Sequence

import numpy as np

Fit = tuple[np.ndarray, float]  # slopes (D,) and intercept
NEWTON_ROWS = 5000  # beyond, the Hessian costs more than scikit-learn's solver without one
MAX_STEPS, TOLERANCE = 100, 1e-10


def ridge_path(features: np.ndarray, truth: np.ndarray, strengths: Sequence[float]) -> list[Fit]:
    """Minimises sum (truth - features w - b)^2 + strength |w|^2 for each strength.

    Args:
        features: (N, D).
        truth: (N,).
    """
    mean, level = features.mean(0), truth.mean()
    centred = features - mean
    squares, axes = np.linalg.eigh(centred.T @ centred)
    along = axes.T @ (centred.T @ (truth - level))
    slopes = [axes @ (along / (np.maximum(squares, 0) + strength)) for strength in strengths]
    return [(found, float(level - mean @ found)) for found in slopes]


def logistic_path(
    features: np.ndarray, truth: np.ndarray, strengths: Sequence[float], weights: np.ndarray | None = None
) -> list[Fit]:
    """Minimises strength * sum weights * log(1 + exp(-+(features w + b))) + |w|^2 / 2 for each strength.

    Each begins where the one before has ended.

    Args:
        features: (N, D).
        truth: (N,), 0 or 1, both present.
        weights: (N,) of the rows; None: 1 each.
    """
    weights = np.ones(len(truth)) if weights is None else weights
    if len(truth) > NEWTON_ROWS:
        return [_fit_without_hessian(features, truth, strength, weights) for strength in strengths]
    share = float(weights @ truth / weights.sum())
    found = np.append(np.zeros(features.shape[1]), np.log(share / (1 - share)))
    extended, fits = np.column_stack([features, np.ones(len(truth))]), []
    for strength in strengths:
        found = _newton(extended, truth, strength * weights, found)
        fits.append((found[:-1], float(found[-1])))
    return fits


def _newton(extended: np.ndarray, truth: np.ndarray, weights: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Slopes and intercept (D + 1,) by Newton's method with step halving; only the slopes are penalised."""
    sign, penalty = np.where(truth == 1, -1.0, 1.0), np.ones(len(start))
    penalty[-1] = 0.0

    def objective(found: np.ndarray, margin: np.ndarray) -> float:
        return float(weights @ np.logaddexp(0, sign * margin) + (penalty * found) @ found / 2)

    found, margin = start, extended @ start
    value = objective(found, margin)
    for _ in range(MAX_STEPS):
        probability = 1 / (1 + np.exp(-np.clip(margin, -500, 500)))
        gradient = extended.T @ (weights * (probability - truth)) + penalty * found
        curvature = weights * probability * (1 - probability)
        hessian = extended.T @ (curvature[:, None] * extended)
        hessian.flat[:: len(start) + 1] += penalty + 1e-12 * weights.sum()
        step, length = np.linalg.solve(hessian, gradient), 1.0
        decrease = float(gradient @ step)
        if decrease <= TOLERANCE * (1 + abs(value)):
            return found - step
        while True:
            tried = found - length * step
            margin = extended @ tried
            lower = objective(tried, margin)
            if lower <= value - 1e-4 * length * decrease or length < 1e-6:
                break
            length /= 2
        found, value = tried, lower
    return found


def _fit_without_hessian(features: np.ndarray, truth: np.ndarray, strength: float, weights: np.ndarray) -> Fit:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=2000).fit(features, truth, weights)
    return model.coef_[0], float(model.intercept_[0])
