"""The probe evaluations: fit on train and look once at test (`Probes`), or apply what is frozen elsewhere (`External`).

Names: `probe/<probe>/<metric>`, `baseline/<baseline>/<probe>/<metric>`, each with `_low` and `_high`, the 95 % interval
of a bootstrap over subjects; `baseline/<baseline>/<probe>/<metric>_difference` (with interval, on the same resamples)
is signed so that positive = ours better, for errors as for scores; `probe/<probe>/mae_share_to_volumes` is how far ours
gets from always-the-mean (0) to the true volumes (1). With a probe's `bias_correction`, `unbiased_mae` and
`gap_pearson`, `unbiased_gap_pearson`: the correlation of prediction - truth with truth, before and after it.
`External` puts `external/` before them.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ldae.editing.frozen_probes import EMBEDDING, FrozenProbe, read_frozen_probes, write_frozen_probes
from ldae.evaluation import figures
from ldae.evaluation.context import Context
from ldae.evaluation.probes.baselines import BASELINES, CHOICES, REDUCED, Features, read_numbers
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise
from ldae.evaluation.probes.fitting import fit
from ldae.evaluation.probes.scores import pearson
from ldae.evaluation.probes.targets import Classification, Regression
from ldae.utils.errors import UserError
from ldae.utils.files import replacing

log = logging.getLogger(__name__)

Probe = Classification | Regression
UNBIASED = ":unbiased"  # behind a predictor's name


class Probes:
    """Fit every probe and every baseline on `fit_splits`, score them on test, store them frozen in `probes.json`.

    The probes are fitted on train alone by default: val is left for whatever a user wants to choose by labels.
    """

    def __init__(
        self,
        probes: Mapping[str, Probe],
        baselines: Sequence[str] = BASELINES,
        resamples: int = 1000,
        fit_splits: Sequence[str] = ("train",),
        baseline_visits_only: bool = False,
        pca_widths: Sequence[int] = (8, 16, 32, 64, 128),
    ):
        check_baselines(baselines, "evaluation.probes.baselines")
        self.probes, self.baselines, self.resamples = dict(probes or {}), list(baselines), resamples
        self.fit_splits, self.baseline_visits_only = list(fit_splits), baseline_visits_only
        self.pca_widths = list(pca_widths)

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        features, frozen = Features(context), {}
        usable = find_first_visits(context.table) if self.baseline_visits_only else np.ones(len(context.table), bool)
        for name, probe in self.probes.items():
            truth = probe.target(context.table)
            known = usable & np.isfinite(truth)
            rows = {
                "fit": np.array([row for row in context.rows(*self.fit_splits) if known[row]], dtype=int),
                "test": np.array([row for row in context.rows("test") if known[row]], dtype=int),
            }
            problem = self._problem(probe, truth, context.table, rows)
            if problem:
                log.warning("probe %s is skipped: %s", name, problem)
                continue
            baselines = features.select_applicable(self.baselines, probe.column)
            entries = fit_predictors(
                context, probe, features, truth, rows["fit"], baselines, self.pca_widths, context.seed
            )
            frozen[name] = entries
            yield from score_predictors(context, name, probe, entries, features, truth, rows["test"], self.resamples)
        write_frozen_probes(context.out / "probes.json", frozen, context.weights)

    def _problem(self, probe: Probe, truth: np.ndarray, table: pd.DataFrame, rows: dict[str, np.ndarray]) -> str | None:
        for part, index in rows.items():
            subjects = table["subject"].to_numpy(str)[index]
            why = probe.reason_unusable(truth[index], subjects, fitting=part == "fit")
            if why:
                return f"{' + '.join(self.fit_splits) if part == 'fit' else part} has {why}"
        return None


def check_baselines(names: Sequence[str], key: str) -> None:
    """Refuse a baseline that there is not, naming the config's `key`."""
    unknown = sorted(set(names) - set(CHOICES))
    if unknown:
        raise UserError(f"{key}: unknown {unknown[0]!r}, choose from {', '.join(CHOICES)}")


def fit_predictors(
    context: Context,
    probe: Probe,
    features: Features,
    truth: np.ndarray,
    rows: np.ndarray,
    baselines: Sequence[str],
    widths: Sequence[int],
    seed: int,
) -> dict[str, FrozenProbe]:
    """Our probe and the baselines, which must apply, fitted on `rows` and on nothing else."""
    subjects, fitted = context.table["subject"].to_numpy(str)[rows], {}
    for name in (EMBEDDING, *baselines):
        columns, values = features(name)
        model = fit(probe, values[rows], truth[rows], subjects, seed, widths if name in REDUCED else None)
        fitted[name] = FrozenProbe(columns, model)
    return fitted


class ExternalCohort:
    """Apply the frozen probes and baselines of an earlier `evaluation=probes` to every scan of another cohort.

    Nothing is fitted here, scaling included. Figures and predictions are named `external_...`.
    """

    def __init__(self, frozen: str | Path, resamples: int = 1000, baseline_visits_only: bool = False):
        """`frozen` is the probes.json that `evaluation=probes` wrote for the same encoder."""
        self.frozen, self.resamples, self.baseline_visits_only = Path(frozen), resamples, baseline_visits_only

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        features, table = Features(context), context.table
        usable = find_first_visits(table) if self.baseline_visits_only else np.ones(len(table), bool)
        for name, entries in read_frozen_probes(self.frozen, context.weights).items():
            model = entries[EMBEDDING].model
            probe = Regression(model.column, bias_correction=model.bias is not None)
            if model.classes is not None:
                probe = Classification(model.column, positive=model.classes[1], negative=model.classes[0])
            truth = probe.target(table)
            rows = np.flatnonzero(usable & np.isfinite(truth))
            why = probe.reason_unusable(truth[rows], table["subject"].to_numpy(str)[rows], fitting=False)
            if why:
                log.warning("external probe %s is skipped: the cohort has %s", name, why)
                continue
            yield from score_predictors(
                context, name, probe, entries, features, truth, rows, self.resamples, "external/"
            )


def find_first_visits(table: pd.DataFrame) -> np.ndarray:
    """(N,) bool: the earliest session of every subject."""
    first = table.groupby("subject")["months"].transform("min")
    return (table["months"] == first).to_numpy()


def score_predictors(
    context: Context,
    name: str,
    probe: Probe,
    entries: Mapping[str, FrozenProbe],
    features: Features,
    truth: np.ndarray,
    rows: np.ndarray,
    resamples: int,
    prefix: str = "",
) -> Iterator[tuple[str, float]]:
    """Score the fitted predictors on `rows`: metrics, intervals, paired differences, figures and predictions."""
    table = context.table.iloc[rows]
    age = read_numbers(table, "age")
    weights = draw_subject_weights(table["subject"], resamples, context.seed)
    predictions: dict[str, np.ndarray] = {}
    for key, entry in entries.items():
        columns, values = features(key, entry.columns)
        if columns and not np.isfinite(values[rows]).any(0).all():
            log.warning("baseline %s is left out for %s: the table lacks one of %s", key, name, ", ".join(columns))
            continue
        predictions[key] = entry.model.predict(values[rows])
    unbiased = {key: entries[key].model.unbiased(value) for key, value in predictions.items()}
    found = {
        key: score_predictor(probe, truth[rows], value, unbiased[key], age, weights)
        for key, value in predictions.items()
    }
    yield from metrics_by_name(found, name, probe, table, prefix)
    shown = unbiased if probe.bias_correction else {}
    _record(context, f"{prefix.replace('/', '_')}{name}", probe, table, truth[rows], predictions, shown)


def score_predictor(
    probe: Probe, truth: np.ndarray, prediction: np.ndarray, unbiased: np.ndarray, age: np.ndarray, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Every metric of one predictor, (1 + R,) each; prediction and unbiased: (N,)."""
    found = probe.scores(truth, prediction, age, weights)
    if probe.bias_correction:
        found["unbiased_mae"] = weights @ np.abs(unbiased - truth) / weights.sum(1)
        found["gap_pearson"] = pearson(prediction - truth, truth, weights)
        found["unbiased_gap_pearson"] = pearson(unbiased - truth, truth, weights)
    return found


def metrics_by_name(
    found: Mapping[str, Mapping[str, np.ndarray]], name: str, probe: Probe, table: pd.DataFrame, prefix: str = ""
) -> Iterator[tuple[str, float]]:
    """Numbers of all predictors with intervals and paired differences, under the names that the module tells."""
    yield f"{prefix}probe/{name}/scans", float(len(table))
    yield f"{prefix}probe/{name}/subjects", float(table["subject"].nunique())
    for key, scores in found.items():
        stem = f"{prefix}probe/{name}" if key == EMBEDDING else f"{prefix}baseline/{key}/{name}"
        for metric, values in scores.items():
            yield from summarise(f"{stem}/{metric}", values)
            if key != EMBEDDING and metric in probe.better and metric in found[EMBEDDING]:
                difference = probe.better[metric] * (found[EMBEDDING][metric] - values)
                yield from summarise(f"{stem}/{metric}_difference", difference)
    if {"mean", "volumes"} <= found.keys() and "mae" in found[EMBEDDING]:
        mean, volumes, ours = (found[key]["mae"] for key in ("mean", "volumes", EMBEDDING))
        yield from summarise(f"{prefix}probe/{name}/mae_share_to_volumes", (mean - ours) / (mean - volumes))


def _record(
    context: Context,
    stem: str,
    probe: Probe,
    table: pd.DataFrame,
    truth: np.ndarray,
    predictions: dict[str, np.ndarray],
    unbiased: dict[str, np.ndarray],
) -> None:
    """Predictions as a CSV, and the figures of a classifier or of a regression."""
    who = {"subject": table["subject"], "session": table["session"], "age": read_numbers(table, "age")}
    rows: dict[str, Any] = who | {"truth": truth}
    with replacing(context.out / f"{stem}_predictions.csv") as temporary:
        pd.DataFrame(rows | predictions | {f"{key}{UNBIASED}": value for key, value in unbiased.items()}).to_csv(
            temporary, index=False
        )
    if probe.classes is None:
        figures.draw_scatter(
            context.out / f"{stem}_scatter.png",
            probe.column,
            figures.UNITS.get(probe.column, ""),
            truth,
            predictions[EMBEDDING],
        )
        return
    figures.draw_roc_curves(context.out / f"{stem}_roc.png", truth, predictions)
    figures.draw_confusion_matrix(context.out / f"{stem}_confusion.png", truth, predictions[EMBEDDING], probe.classes)
