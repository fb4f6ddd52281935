"""Fits one linear probe on training rows. Every choice is made by cross-validation over the subjects of these rows.

The model is mean imputation, optionally PCA, standardisation, then logistic or ridge regression. All of it, scaling and
PCA included, is refitted in every fold, so that nothing depends on a held-out fold or on the test set.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ldae.editing.linear_model import LinearModel

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from ldae.evaluation.probes.targets import Probe

log = logging.getLogger(__name__)

REPEATS = 2  # how often the folds are drawn
SMALL = 4_000_000  # up to this many values, PCA is exact and one thread is used
MIN_SLOPE = 0.05  # below this slope of predicted over true values there is nothing to correct
Setting = tuple[int | None, float]  # PCA width and regularisation strength


def fit(
    probe: "Probe",
    features: np.ndarray,
    truth: np.ndarray,
    subjects: np.ndarray,
    seed: int,
    widths: Sequence[int] | None = None,
) -> LinearModel:
    """Choose the PCA width (if `widths` are given) and the regularisation by folds, then refit on all rows.

    Args:
        features: (N, D), NaN where missing; D = 0 gives a constant predictor.
        truth: (N,), 0 or 1 for a class, or a number.
        subjects: (N,); no subject is on both sides of a fold.
    """
    if features.shape[1] == 0:
        return _constant_model(probe, truth)
    if widths and len(features) < features.shape[1] and np.isfinite(features).all():
        coordinates, axes = _rotate_into_span(features)
        found = fit(probe, coordinates, truth, subjects, seed, widths)
        return replace(found, mean=axes @ found.mean, std=np.ones(len(axes)), coef=axes @ found.coef)
    width, strength = choose_settings(probe, features, truth, subjects, seed, widths)
    reducer, predictor = build_reducer(features, width, seed), build_predictor(probe, strength)
    predictor.fit(reducer.fit_transform(features), truth)
    fitted = _as_linear_model(probe, reducer, predictor)
    if not probe.bias_correction:
        return fitted
    return replace(fitted, bias=_fit_bias(probe, features, truth, subjects, seed, width, strength))


def _rotate_into_span(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, D), N < D, in an orthonormal basis of their span: coordinates (N, R), and the axes (D, R).

    Principal components of any of the rows are the same in these coordinates, and thousands of voxels become at most N
    numbers.
    """
    features = np.asarray(features, np.float64)
    values, vectors = np.linalg.eigh(features @ features.T)
    kept = values >= 1e-10 * values[-1]  # all of them if every value is 0
    lengths = np.sqrt(np.maximum(values[kept], np.finfo(np.float64).tiny))
    return vectors[:, kept] * lengths, features.T @ (vectors[:, kept] / lengths)


def _fit_bias(
    probe: "Probe",
    features: np.ndarray,
    truth: np.ndarray,
    subjects: np.ndarray,
    seed: int,
    width: int | None,
    strength: float,
) -> tuple[float, float] | None:
    """(intercept, slope) of out-of-fold predictions over true values; None if predictions do not follow them."""
    predicted = np.full(len(truth), np.nan)
    for inner, held in probe.folds(truth, subjects, seed):
        usable = _usable_widths([width], len(inner), features.shape[1])[0] if width else None
        reducer, predictor = build_reducer(features[inner], usable, seed), build_predictor(probe, strength)
        predictor.fit(reducer.fit_transform(features[inner]), truth[inner])
        predicted[held] = predictor.predict(reducer.transform(features[held]))
    slope, intercept = np.polyfit(truth, predicted, 1)
    return (float(intercept), float(slope)) if slope > MIN_SLOPE else None


def choose_settings(
    probe: "Probe",
    features: np.ndarray,
    truth: np.ndarray,
    subjects: np.ndarray,
    seed: int,
    widths: Sequence[int] | None,
) -> Setting:
    """The PCA width with the lowest held-out loss, and for it the strongest penalty that is about as good.

    About as good means: the loss exceeds the lowest by at most `probe.tolerance` standard errors of the difference,
    over subjects. (The rule of Breiman et al. 1984 takes the standard error of the lowest loss itself, as if the two
    settings had been tried on different subjects.)
    """
    losses = _held_out_losses(probe, features, truth, subjects, seed, widths)
    best = min(losses, key=lambda setting: losses[setting].mean())
    width, lowest = best[0], losses[best]
    strength = next(s for s in probe.strengths if _is_as_good(losses[width, s] - lowest, probe.tolerance))
    log.debug("%s: width %s, strength %g chosen", probe.column, width, strength)
    return width, strength


def _held_out_losses(
    probe: "Probe",
    features: np.ndarray,
    truth: np.ndarray,
    subjects: np.ndarray,
    seed: int,
    widths: Sequence[int] | None,
) -> dict[Setting, np.ndarray]:
    """Mean held-out loss of each subject, (S,), for every setting that was possible in all folds.

    Folds are drawn `REPEATS` times, because which subjects share a fold moves the best strength by a factor of ten.
    """
    from threadpoolctl import threadpool_limits

    total: dict[Setting, np.ndarray] = {}
    folds: Counter[int | None] = Counter()
    tries = np.zeros(len(truth))
    # On a small fit, threads spend more time waiting for each other than they save.
    with threadpool_limits(1 if features.size <= SMALL else None):
        for repeat in range(REPEATS):
            for inner, held in probe.folds(truth, subjects, seed + repeat):
                tries[held] += 1
                usable = _usable_widths(widths, len(inner), features.shape[1])
                folds.update(usable)
                # The leading components of one PCA are the PCA of every smaller width: one decomposition per fold.
                reducer = build_reducer(features[inner], usable[-1], seed)
                fitting, testing = reducer.fit_transform(features[inner]), reducer.transform(features[held])
                for width in usable:
                    x_fit, x_test = _standardise(fitting[:, :width], testing[:, :width])
                    for strength in probe.strengths:
                        model = probe.estimator(strength).fit(x_fit, truth[inner])
                        losses = total.setdefault((width, strength), np.zeros(len(truth)))
                        losses[held] += probe.losses(model, x_test, truth[held])
    tested, most = tries > 0, max(folds.values())
    return {
        setting: _mean_per_subject(losses[tested] / tries[tested], subjects[tested])
        for setting, losses in total.items()
        if folds[setting[0]] == most
    }


def _mean_per_subject(values: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    _, subject = np.unique(subjects, return_inverse=True)
    return np.bincount(subject, values) / np.bincount(subject)


def _standardise(fitting: np.ndarray, testing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both standardised with the mean and standard deviation of the fitting rows.

    If there are fewer fitting rows than columns, both are rotated into the span of the fitting rows: a penalty on the
    squared length of the slopes is the same there and takes less arithmetic.
    """
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(fitting)
    fitting, testing = scaler.transform(fitting), scaler.transform(testing)
    if len(fitting) >= fitting.shape[1]:
        return fitting, testing
    fitting, axes = _rotate_into_span(fitting)
    return fitting, testing @ axes


def _is_as_good(excess: np.ndarray, tolerance: float) -> bool:
    """Whether the mean of `excess`, one loss difference per subject, is within `tolerance` standard errors of 0."""
    error = excess.std(ddof=1) / np.sqrt(len(excess)) if len(excess) > 1 else 0.0
    return bool(excess.mean() <= tolerance * error)


def _usable_widths(widths: Sequence[int] | None, rows: int, columns: int) -> list[int | None]:
    """The PCA widths that this many rows and columns allow, ascending; [None] without PCA."""
    if not widths:
        return [None]
    limit = min(rows - 1, columns)
    return sorted({min(width, limit) for width in widths})


def build_reducer(features: np.ndarray, width: int | None, seed: int) -> "Pipeline":
    """Mean imputation, then the leading `width` principal components; None keeps the features."""
    from sklearn.decomposition import PCA
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline

    imputer = SimpleImputer(keep_empty_features=True)
    if width is None:
        return make_pipeline(imputer)
    # Exact if that is cheap, otherwise randomised with a fixed seed.
    solver = "full" if features.size <= SMALL else "randomized"
    return make_pipeline(imputer, PCA(width, svd_solver=solver, random_state=seed))


def build_predictor(probe: "Probe", strength: float) -> "Pipeline":
    """Standardisation, then the probe's estimator."""
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), probe.estimator(strength))


def _constant_model(probe: "Probe", truth: np.ndarray) -> LinearModel:
    """Always the mean; for a class, always its share, which predicts the majority class."""
    mean = float(truth.mean())
    intercept = mean if probe.classes is None else float(np.log(mean / (1 - mean)))
    none = np.zeros(0)
    return LinearModel(probe.column, none, none, none, intercept, probe.classes)


def _as_linear_model(probe: "Probe", reducer: "Pipeline", predictor: "Pipeline") -> LinearModel:
    """Imputation, PCA and standardisation folded into mean, std, coef and intercept of the input features."""
    scaler, estimator = predictor[0], predictor[-1]
    coef, intercept = np.ravel(estimator.coef_), float(np.ravel(estimator.intercept_)[0])
    if len(reducer) == 1:
        return LinearModel(probe.column, scaler.mean_, scaler.scale_, coef, intercept, probe.classes)
    pca = reducer[-1]
    slopes = coef / scaler.scale_  # of the components
    intercept -= float(slopes @ scaler.mean_)  # the components' mean, which is 0 up to rounding
    ones = np.ones_like(pca.mean_, dtype=np.float64)
    direction = pca.components_.T.astype(np.float64) @ slopes
    return LinearModel(probe.column, pca.mean_.astype(np.float64), ones, direction, intercept, probe.classes)
