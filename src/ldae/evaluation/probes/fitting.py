"""Fits one linear probe on training rows. Every choice is made by cross-validation over the subjects of these rows.

The model is mean imputation, optionally PCA, scaling (scaling.py), then logistic or ridge regression. All of it,
scaling and PCA included, is refitted in every fold, so that nothing depends on a held-out fold or on the test set. Only
components that are given as such (`Block.are_components`) are not computed again.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ldae.editing.linear_model import LinearModel
from ldae.evaluation.probes.blocks import Block, Preparation, prepare, rotate_into_span

if TYPE_CHECKING:
    from ldae.evaluation.probes.targets import Probe

log = logging.getLogger(__name__)

REPEATS = 2  # how often the folds are drawn
SMALL = 4_000_000  # up to this many values, one thread is used
MIN_SLOPE = 0.05  # below this slope of predicted over true values there is nothing to correct
Setting = tuple[int | None, float]  # PCA width and regularisation strength


def fit(
    probe: "Probe",
    features: np.ndarray | Sequence[Block],
    truth: np.ndarray,
    subjects: np.ndarray,
    seed: int,
) -> LinearModel:
    """Choose the PCA width (if a block has widths) and the regularisation by folds, then refit on all rows.

    Args:
        features: blocks of N rows, or one array (N, D), NaN where missing; D = 0 gives a constant predictor.
        truth: (N,), 0 or 1 for a class, or a number.
        subjects: (N,); no subject is on both sides of a fold.

    Returns:
        A model of the features of all blocks side by side.
    """
    blocks = [Block(features)] if isinstance(features, np.ndarray) else list(features)
    if sum(block.values.shape[1] for block in blocks) == 0:
        return _constant_model(probe, truth)
    setting = choose_settings(probe, blocks, truth, subjects, seed)
    fitted = _fit_setting(probe, blocks, truth, seed, setting)
    if not probe.bias_correction:
        return fitted
    return replace(fitted, bias=_fit_bias(probe, blocks, truth, subjects, seed, setting))


def _fit_setting(
    probe: "Probe", blocks: Sequence[Block], truth: np.ndarray, seed: int, setting: Setting
) -> LinearModel:
    """The model of one setting, with imputation, PCA and scaling folded into mean, std, coef and intercept."""
    width, strength = setting
    prepared = _prepare_all(probe, blocks, width, seed)
    values = np.concatenate([do(block.values) for do, block in zip(prepared, blocks, strict=True)], 1)
    axes = rotate_into_span(values) if len(values) < values.shape[1] else None
    ((coef, intercept),) = probe.solve(values if axes is None else values @ axes, truth, [strength])
    coef = coef if axes is None else axes @ coef
    means, stds, coefs, start = [], [], [], 0
    for do in prepared:
        part = coef[start : start + len(do.divisors)]
        start += len(do.divisors)
        means.append(do.mean)
        stds.append(do.divisors if do.axes is None else np.ones(len(do.mean)))
        coefs.append(part if do.axes is None else do.axes @ (part / do.divisors))
    arrays = (np.concatenate(parts) for parts in (means, stds, coefs))
    return LinearModel(probe.column, *arrays, intercept, probe.classes)


def _prepare_all(probe: "Probe", blocks: Sequence[Block], width: int | None, seed: int) -> list[Preparation]:
    """The preparation of each block; blocks with widths are reduced to `width` components, or what their rows allow."""
    return [
        prepare(block, min(width, block.usable_widths()[-1]) if block.widths else None, probe.scaling, seed)
        for block in blocks
    ]


def _fit_bias(
    probe: "Probe", blocks: Sequence[Block], truth: np.ndarray, subjects: np.ndarray, seed: int, setting: Setting
) -> tuple[float, float] | None:
    """(intercept, slope) of out-of-fold predictions over true values; None if predictions do not follow them."""
    predicted = np.full(len(truth), np.nan)
    for inner, held in probe.folds(truth, subjects, seed):
        model = _fit_setting(probe, [block.take(inner) for block in blocks], truth[inner], seed, setting)
        predicted[held] = model.decision(np.concatenate([block.values[held] for block in blocks], 1))
    slope, intercept = np.polyfit(truth, predicted, 1)
    return (float(intercept), float(slope)) if slope > MIN_SLOPE else None


def choose_settings(
    probe: "Probe", blocks: Sequence[Block], truth: np.ndarray, subjects: np.ndarray, seed: int
) -> Setting:
    """The PCA width with the lowest held-out loss, and for it the strongest penalty that is about as good.

    About as good means: the loss exceeds the lowest by at most `probe.tolerance` standard errors of the difference,
    over subjects. (The rule of Breiman et al. 1984 takes the standard error of the lowest loss itself, as if the two
    settings had been tried on different subjects.)
    """
    losses = _held_out_losses(probe, blocks, truth, subjects, seed)
    best = min(losses, key=lambda setting: losses[setting].mean())
    width, lowest = best[0], losses[best]
    strength = next(s for s in probe.strengths if _is_as_good(losses[width, s] - lowest, probe.tolerance))
    log.debug("%s: width %s, strength %g chosen", probe.column, width, strength)
    return width, strength


def _held_out_losses(
    probe: "Probe", blocks: Sequence[Block], truth: np.ndarray, subjects: np.ndarray, seed: int
) -> dict[Setting, np.ndarray]:
    """Mean held-out loss of each subject, (S,), for every setting that was possible in all folds.

    Folds are drawn `REPEATS` times, because which subjects share a fold moves the best strength by a factor of ten.
    """
    from threadpoolctl import threadpool_limits

    total: dict[Setting, np.ndarray] = {}
    folds: Counter[int | None] = Counter()
    tries = np.zeros(len(truth))
    size = sum(block.values.size for block in blocks)
    # On a small fit, threads spend more time waiting for each other than they save.
    with threadpool_limits(1 if size <= SMALL else None):
        for repeat in range(REPEATS):
            for inner, held in probe.folds(truth, subjects, seed + repeat):
                tries[held] += 1
                fitting, testing = ([block.take(rows) for block in blocks] for rows in (inner, held))
                for width, x_fit, x_test in _prepared_folds(probe, fitting, testing, seed):
                    folds[width] += 1
                    fits = probe.solve(x_fit, truth[inner], probe.strengths)
                    for strength, (coef, intercept) in zip(probe.strengths, fits, strict=True):
                        losses = total.setdefault((width, strength), np.zeros(len(truth)))
                        losses[held] += probe.losses(x_test @ coef + intercept, truth[held])
    tested, most = tries > 0, max(folds.values())
    return {
        setting: _mean_per_subject(losses[tested] / tries[tested], subjects[tested])
        for setting, losses in total.items()
        if folds[setting[0]] == most
    }


def _prepared_folds(
    probe: "Probe", fitting: Sequence[Block], testing: Sequence[Block], seed: int
) -> Iterator[tuple[int | None, np.ndarray, np.ndarray]]:
    """(width, prepared fitting rows, prepared testing rows) for every usable width; [None] without PCA.

    If there are fewer fitting rows than features, both are rotated into the span of the fitting rows.
    """
    widths = sorted({width for block in fitting for width in block.usable_widths()})
    prepared = _prepare_all(probe, fitting, widths[-1] if widths else None, seed)
    for width in widths or [None]:
        chosen = [
            do if do.axes is None else do.narrowed(block, width, probe.scaling)
            for do, block in zip(prepared, fitting, strict=True)
        ]
        x_fit, x_test = (
            np.concatenate([do(block.values) for do, block in zip(chosen, blocks, strict=True)], 1)
            for blocks in (fitting, testing)
        )
        if len(x_fit) < x_fit.shape[1]:
            axes = rotate_into_span(x_fit)
            x_fit, x_test = x_fit @ axes, x_test @ axes
        yield width, x_fit, x_test


def _mean_per_subject(values: np.ndarray, subjects: np.ndarray) -> np.ndarray:
    _, subject = np.unique(subjects, return_inverse=True)
    return np.bincount(subject, values) / np.bincount(subject)


def _is_as_good(excess: np.ndarray, tolerance: float) -> bool:
    """Whether the mean of `excess`, one loss difference per subject, is within `tolerance` standard errors of 0."""
    error = excess.std(ddof=1) / np.sqrt(len(excess)) if len(excess) > 1 else 0.0
    return bool(excess.mean() <= tolerance * error)


def _constant_model(probe: "Probe", truth: np.ndarray) -> LinearModel:
    """Always the mean; for a class, always its share, which predicts the majority class."""
    mean = float(truth.mean())
    intercept = mean if probe.classes is None else float(np.log(mean / (1 - mean)))
    none = np.zeros(0)
    return LinearModel(probe.column, none, none, none, intercept, probe.classes)
