"""Fits and scores the predictors of one probe: the embedding and the baselines, on the same rows.

evaluator.py says what the metrics are called.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ldae.editing.frozen_probes import EMBEDDING
from ldae.evaluation import figures
from ldae.evaluation.context import Context
from ldae.evaluation.other_cohort import file_prefix
from ldae.evaluation.probes.baselines import STACKED, UNTRAINED, VIEW, Features, is_draw
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise
from ldae.evaluation.probes.fitted_predictors import FittedPredictor, Predictor
from ldae.evaluation.probes.scores import pearson
from ldae.evaluation.probes.table_features import read_numbers
from ldae.evaluation.probes.targets import Probe

UNBIASED = ":unbiased"  # appended to a predictor's name: column of its bias-corrected predictions


def fit_predictors(
    context: Context,
    probe: Probe,
    features: Features,
    truth: np.ndarray,
    rows: np.ndarray,
    baselines: Sequence[str],
    seed: int,
) -> dict[str, FittedPredictor]:
    """The probe of the embedding and the applicable `baselines`, fitted on `rows` only.

    Args:
        truth: (N,), one label per row of the table.
    """
    predictors = {}
    for name in (EMBEDDING, *baselines):
        columns, sources = features(name)
        fitted = [source.fit_on(rows, seed) for source in sources]
        blocks = [source.block(rows) for source in fitted]
        model = probe.fit(blocks, truth[rows], context.subjects(rows), seed)
        predictors[name] = FittedPredictor(columns, fitted, model)
    return predictors


def score_predictors(
    context: Context,
    name: str,
    probe: Probe,
    predictors: Mapping[str, Predictor],
    features: Features,
    truth: np.ndarray,
    rows: np.ndarray,
    resamples: int,
    prefix: str = "",
) -> Iterator[tuple[str, float]]:
    """Score the fitted predictors on `rows`; yields their metrics and writes figures and predictions.

    Args:
        truth: (N,), one label per row of the table.
        prefix: what the names of metrics begin with.
    """
    table = context.table.iloc[rows]
    predictions: dict[str, np.ndarray] = {}
    for key, predictor in predictors.items():
        reason = features.reason_unreadable(key, predictor.columns, rows)
        if reason:
            context.skip(f"baseline {key} is not computed for {name}: {reason}")
            continue
        predictions[key] = predictor.predict(rows)
    unbiased = {key: predictors[key].unbiased(value) for key, value in predictions.items()}
    age, weights = read_numbers(table, "age"), draw_subject_weights(table["subject"], resamples, context.seed)
    scores = {
        key: score_predictor(probe, truth[rows], predictions[key], unbiased[key], age, weights) for key in unbiased
    }
    yield from metrics_by_name(scores, name, probe, table, prefix)
    stem = f"{file_prefix(prefix)}{name}"
    corrected = {f"{key}{UNBIASED}": value for key, value in unbiased.items()} if probe.bias_correction else {}
    scans = table[["subject", "session"]].assign(age=age, truth=truth[rows])
    context.write_csv(f"{stem}_predictions.csv", scans.assign(**predictions, **corrected))
    draw_predictions(context.out, stem, probe, truth[rows], predictions)
    if probe.classes is not None:
        file = context.out / f"{stem}_confusion.png"
        figures.draw_confusion_matrix(file, truth[rows], predictions[EMBEDDING], probe.classes)


def score_predictor(
    probe: Probe, truth: np.ndarray, prediction: np.ndarray, unbiased: np.ndarray, age: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Every metric of one predictor, (1 + R,) each.

    Args:
        prediction, unbiased: (N,), before and after the bias correction.
        weights: (1 + R, N), see bootstrap.py.
    """
    scores = probe.scores(truth, prediction, age, weights)
    if probe.bias_correction:
        scores["unbiased_mae"] = weights @ np.abs(unbiased - truth) / weights.sum(1)
        scores["gap_pearson"] = pearson(prediction - truth, truth, weights)
        scores["unbiased_gap_pearson"] = pearson(unbiased - truth, truth, weights)
    return scores


def metrics_by_name(
    scores: Mapping[str, Mapping[str, np.ndarray]], name: str, probe: Probe, table: pd.DataFrame, prefix: str = ""
) -> Iterator[tuple[str, float]]:
    """Metrics of all predictors with intervals and paired differences, named as evaluator.py says.

    Args:
        scores: predictor -> metric -> values (1 + R,).
        table: the rows that were scored.
    """
    yield f"{prefix}probe/{name}/scans", float(len(table))
    yield f"{prefix}probe/{name}/subjects", float(table["subject"].nunique())
    ours = scores[EMBEDDING]
    for key, metrics in scores.items():
        if not is_draw(key):
            stem = f"{prefix}probe/{name}" if key == EMBEDDING else f"{prefix}baseline/{key}/{name}"
            yield from _summarise_predictor(stem, probe, metrics, None if key == EMBEDDING else ours)
    draws = [metrics for key, metrics in scores.items() if is_draw(key)]
    if draws:
        stem = f"{prefix}baseline/{UNTRAINED}/{name}"
        stacked = {metric: np.stack([metrics[metric] for metrics in draws]) for metric in draws[0]}  # (draws, 1 + R)
        means = {metric: values.mean(0) for metric, values in stacked.items()}
        yield from _summarise_predictor(stem, probe, means, ours)
        for metric, values in stacked.items():
            if len(draws) > 1:
                yield f"{stem}/{metric}_spread", float(values[:, 0].std(ddof=1))
    if {VIEW, STACKED} <= scores.keys():
        both, alone = scores[STACKED], scores[VIEW]
        for metric in [metric for metric in probe.signs if metric in both and metric in alone]:
            gain = probe.signs[metric] * (both[metric] - alone[metric])
            yield from summarise(f"{prefix}baseline/{STACKED}/{name}/{metric}_gain", gain)
    if {"mean", "volumes"} <= scores.keys() and "mae" in ours:
        mean, volumes = scores["mean"]["mae"], scores["volumes"]["mae"]
        yield from summarise(f"{prefix}probe/{name}/mae_share_to_volumes", (mean - ours["mae"]) / (mean - volumes))


def _summarise_predictor(
    stem: str, probe: Probe, metrics: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray] | None
) -> Iterator[tuple[str, float]]:
    """Metrics of one predictor (1 + R,) with intervals; with `ours`, those of the embedding, also the differences."""
    for metric, values in metrics.items():
        yield from summarise(f"{stem}/{metric}", values)
        if ours is not None and metric in probe.signs and metric in ours:
            yield from summarise(f"{stem}/{metric}_difference", probe.signs[metric] * (ours[metric] - values))


def draw_predictions(
    out: Path, stem: str, probe: Probe, truth: np.ndarray, predictions: Mapping[str, np.ndarray]
) -> None:
    """`<stem>_roc.png` of all predictors of a class, or `<stem>_scatter.png` of a number predicted from y."""
    if probe.classes is not None:
        shown = {key: values for key, values in predictions.items() if not is_draw(key) or key == f"{UNTRAINED}_0"}
        figures.draw_roc_curves(out / f"{stem}_roc.png", truth, shown)
        return
    unit = figures.UNITS.get(probe.column, "")
    figures.draw_scatter(out / f"{stem}_scatter.png", probe.column, unit, truth, predictions[EMBEDDING])
