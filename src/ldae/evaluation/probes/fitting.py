"""Fitting one linear probe on training rows: every choice is made by cross-validation over subjects inside them.

The estimator is a scikit-learn Pipeline (mean imputation, optional PCA, standardisation, logistic or ridge regression),
so that nothing, scaling and PCA included, ever sees a held-out fold or the test set.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from ldae.editing.linear_model import LinearModel

log = logging.getLogger(__name__)

REPEATS = 2  # of the folds, each time drawn anew
SMALL = 4_000_000  # numbers in a table that is handled exactly and by one thread
LEAST_SLOPE = 0.05  # of predictions over truth: below it, there is nothing to correct


class Task(Protocol):
    """What a probe predicts and with which estimator; see probes.py."""

    column: str
    classes: tuple[str, str] | None
    strengths: Sequence[float]  # the strongest penalty first
    tolerance: float  # standard errors of held-out loss that a stronger penalty may cost
    bias_correction: bool

    def estimator(self, strength: float) -> Any: ...

    def folds(self, truth: np.ndarray, subjects: np.ndarray, seed: int) -> Iterable[tuple[np.ndarray, np.ndarray]]: ...

    def losses(self, model: Any, features: np.ndarray, truth: np.ndarray) -> np.ndarray: ...


def fit(
    task: Task,
    features: np.ndarray,
    truth: np.ndarray,
    subjects: np.ndarray,
    seed: int,
    widths: Sequence[int] | None = None,
) -> LinearModel:
    """Choose PCA width (if `widths`) and regularisation by grouped folds, refit on all rows, return plain arrays.

    Args:
        features: (N, D), NaN where missing; D = 0 fits a constant.
        truth: (N,), 0/1 for a class or a number.
        subjects: (N,), the groups: no subject is on both sides of a fold.
    """
    if features.shape[1] == 0:
        return _constant(task, truth)
    if widths and len(features) < features.shape[1] and np.isfinite(features).all():
        coordinates, axes = _in_own_span(features)
        found = fit(task, coordinates, truth, subjects, seed, widths)
        return replace(found, mean=axes @ found.mean, std=np.ones(len(axes)), coef=axes @ found.coef)
    width, strength = choose(task, features, truth, subjects, seed, widths)
    reducer = _reducer(features, width, seed)
    predictor = _predictor(task, strength)
    predictor.fit(reducer.fit_transform(features), truth)
    fitted = _as_arrays(task, reducer, predictor)
    if not task.bias_correction:
        return fitted
    return replace(fitted, bias=_bias(task, features, truth, subjects, seed, width, strength))


def _in_own_span(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, D), N < D, in an orthonormal basis of what they span: (N, R), and the axes, (D, R).

    A rotation: principal components of any of the rows are the same there, and thousands of voxels become N numbers.
    """
    features = np.asarray(features, np.float64)
    values, vectors = np.linalg.eigh(features @ features.T)
    kept = values >= 1e-10 * values[-1]  # all of them where nothing differs from 0
    lengths = np.sqrt(np.maximum(values[kept], np.finfo(np.float64).tiny))
    return vectors[:, kept] * lengths, features.T @ (vectors[:, kept] / lengths)


def _bias(
    task: Task,
    features: np.ndarray,
    truth: np.ndarray,
    subjects: np.ndarray,
    seed: int,
    width: int | None,
    strength: float,
) -> tuple[float, float] | None:
    """(intercept, slope) of out-of-fold predictions over truth; None where predictions do not follow it."""
    found = np.full(len(truth), np.nan)
    for inner, held in task.folds(truth, subjects, seed):
        usable = _usable_widths([width], len(inner), features.shape[1])[0] if width else None
        reducer, predictor = _reducer(features[inner], usable, seed), _predictor(task, strength)
        predictor.fit(reducer.fit_transform(features[inner]), truth[inner])
        found[held] = predictor.predict(reducer.transform(features[held]))
    slope, intercept = np.polyfit(truth, found, 1)
    return (float(intercept), float(slope)) if slope > LEAST_SLOPE else None


def choose(
    task: Task,
    features: np.ndarray,
    truth: np.ndarray,
    subjects: np.ndarray,
    seed: int,
    widths: Sequence[int] | None,
) -> tuple[int | None, float]:
    """The width with the lowest held-out loss and, for it, the strongest penalty that is as good: its loss lies at most
    `task.tolerance` standard errors above the lowest.

    The error is that of the difference over subjects (the rule of Breiman et al. 1984 takes the best's own, as if the
    two had been tried on different people). Folds are drawn `REPEATS` times: which subjects come to lie together moves
    the lowest loss by a factor of ten in strength.
    """
    from threadpoolctl import threadpool_limits

    losses: dict[tuple[int | None, float], np.ndarray] = {}
    folds: Counter[int | None] = Counter()
    tries = np.zeros(len(truth))
    # Threads that wait for each other take longer than a small fit.
    with threadpool_limits(1 if features.size <= SMALL else None):
        for repeat in range(REPEATS):
            for inner, held in task.folds(truth, subjects, seed + repeat):
                tries[held] += 1
                usable = _usable_widths(widths, len(inner), features.shape[1])
                # The leading components of one PCA are the PCA of every smaller width: one decomposition a fold.
                reducer = _reducer(features[inner], usable[-1], seed)
                fitted, tried = reducer.fit_transform(features[inner]), reducer.transform(features[held])
                folds.update(usable)
                for width in usable:
                    inside, outside = _standardised(fitted[:, :width], tried[:, :width])
                    for strength in task.strengths:
                        model = task.estimator(strength).fit(inside, truth[inner])
                        found = losses.setdefault((width, strength), np.zeros(len(truth)))
                        found[held] += task.losses(model, outside, truth[held])
    judged, most = tries > 0, max(folds.values())
    _, subject = np.unique(subjects[judged], return_inverse=True)
    complete = {
        key: np.bincount(subject, found[judged] / tries[judged]) / np.bincount(subject)
        for key, found in losses.items()
        if folds[key[0]] == most
    }
    best = min(complete, key=lambda key: complete[key].mean())
    width, lowest = best[0], complete[best]
    strength = next(s for s in task.strengths if _as_good(complete[width, s] - lowest, task.tolerance))
    log.debug("%s: width %s, strength %g chosen", task.column, width, strength)
    return width, strength


def _standardised(inner: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in units of the first's standard deviations, and turned into the space that the first spans, where it has
    fewer rows than columns: a penalty on the squared length of the slopes is the same there, for less arithmetic."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(inner)
    inner, held = scaler.transform(inner), scaler.transform(held)
    if len(inner) >= inner.shape[1]:
        return inner, held
    inner, axes = _in_own_span(inner)
    return inner, held @ axes


def _as_good(excess: np.ndarray, tolerance: float) -> bool:
    """Whether losses in excess of the best's, one a subject, are on average within `tolerance` standard errors of 0."""
    error = excess.std(ddof=1) / np.sqrt(len(excess)) if len(excess) > 1 else 0.0
    return bool(excess.mean() <= tolerance * error)


def _usable_widths(widths: Sequence[int] | None, rows: int, columns: int) -> list[int | None]:
    if not widths:
        return [None]
    limit = min(rows - 1, columns)
    return sorted({min(width, limit) for width in widths})


def _reducer(features: np.ndarray, width: int | None, seed: int) -> Any:
    """Imputation, then the leading `width` principal components; None keeps the features."""
    from sklearn.decomposition import PCA
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline

    fill = SimpleImputer(keep_empty_features=True)
    if width is None:
        return make_pipeline(fill)
    # Exact where that is cheap; beyond, randomised with a fixed seed.
    solver = "full" if features.size <= SMALL else "randomized"
    return make_pipeline(fill, PCA(width, svd_solver=solver, random_state=seed))


def _predictor(task: Task, strength: float) -> Any:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), task.estimator(strength))


def _constant(task: Task, truth: np.ndarray) -> LinearModel:
    """Always the mean; for a class, always its share, which calls the majority class."""
    mean = float(truth.mean())
    intercept = mean if task.classes is None else float(np.log(mean / (1 - mean)))
    none = np.zeros(0)
    return LinearModel(task.column, none, none, none, intercept, task.classes)


def _as_arrays(task: Task, reducer: Any, predictor: Any) -> LinearModel:
    """Fold imputation, PCA and standardisation into (mean, std, coef, intercept) of the input features."""
    scaler, estimator = predictor[0], predictor[-1]
    coef, intercept = np.ravel(estimator.coef_), float(np.ravel(estimator.intercept_)[0])
    if len(reducer) == 1:
        return LinearModel(task.column, scaler.mean_, scaler.scale_, coef, intercept, task.classes)
    pca = reducer[-1]
    slopes = coef / scaler.scale_  # on components, whose training mean is 0 up to rounding
    intercept -= float(slopes @ scaler.mean_)
    ones = np.ones_like(pca.mean_, dtype=np.float64)
    direction = pca.components_.T.astype(np.float64) @ slopes
    return LinearModel(task.column, pca.mean_.astype(np.float64), ones, direction, intercept, task.classes)
