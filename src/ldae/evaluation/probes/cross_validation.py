"""Repeated cross-validation by subject: probes and baselines in the same folds, for cohorts too small for a test split.

Two regimes, never mixed. *Transductive*: the encoder saw the scans without labels (splits train and val). *Inductive*:
it saw none of the scans that are predicted, which are either one run's test split (`CrossValidation`) or the test folds
of several runs, each trained without its fold (`Folds`). Labels of a held-out fold are seen by no probe in either.

Names: `cv/<regime>/probe/<probe>/<metric>` and `cv/<regime>/baseline/<baseline>/<probe>/<metric>`, with intervals and
paired differences as in probing.py: every metric is that of all held-out predictions of a repeat, averaged over
repeats; the bootstrap draws subjects.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ldae.editing.frozen_probes import EMBEDDING
from ldae.evaluation import figures
from ldae.evaluation.context import Context
from ldae.evaluation.probes.baselines import CHOICES, Features, read_numbers
from ldae.evaluation.probes.bootstrap import draw_subject_weights
from ldae.evaluation.probes.evaluator import (
    UNBIASED,
    Probe,
    check_baselines,
    fit_predictors,
    metrics_by_name,
    score_predictor,
)
from ldae.utils.errors import UserError
from ldae.utils.files import replacing

log = logging.getLogger(__name__)

REGIMES = {"transductive": ("train", "val"), "inductive": ("test",)}  # and the splits that are cross-validated
SAID = {
    "transductive": "the encoder saw these scans, without labels",
    "inductive": "the encoder saw none of these scans",
}


class CrossValidation:
    """Probes fitted and judged in folds of the scans that the encoder saw, or of those it did not see."""

    def __init__(
        self,
        probes: Mapping[str, Probe],
        regime: str = "transductive",
        baselines: Sequence[str] = CHOICES,
        repeats: int = 5,
        resamples: int = 1000,
        pca_widths: Sequence[int] = (8, 16, 32, 64, 128),
    ):
        """`repeats`: other folds each; there are five folds a repeat."""
        if regime not in REGIMES:
            raise UserError(f"evaluation.cross_validation.regime={regime}: one of {', '.join(REGIMES)} is needed")
        check_baselines(baselines, "evaluation.cross_validation.baselines")
        self.probes, self.regime, self.baselines = dict(probes or {}), regime, list(baselines)
        self.repeats, self.resamples, self.pca_widths = repeats, resamples, list(pca_widths)

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        features, table = Features(context), context.table
        usable = context.rows(*REGIMES[self.regime])
        log.info("cross-validation, %s: %s (%d)", self.regime, SAID[self.regime], len(usable))
        for name, probe in self.probes.items():
            truth = probe.target(table)
            rows = usable[np.isfinite(truth[usable])]
            why = probe.reason_unusable(truth[rows], table["subject"].to_numpy(str)[rows], fitting=True)
            if why:
                log.warning("probe %s is skipped: splits %s have %s", name, " + ".join(REGIMES[self.regime]), why)
                continue
            baselines = features.select_applicable(self.baselines, probe.column)
            predictions = pd.concat(
                [
                    self._repeat(context, probe, features, baselines, truth, rows, repeat)
                    for repeat in range(self.repeats)
                ]
            )
            yield from score_folds(context, name, probe, predictions, self.regime, self.resamples)

    def _repeat(
        self,
        context: Context,
        probe: Probe,
        features: Features,
        baselines: Sequence[str],
        truth: np.ndarray,
        rows: np.ndarray,
        repeat: int,
    ) -> pd.DataFrame:
        """One row a held-out scan: who, truth, repeat, and the prediction of every predictor, `<name>:unbiased` too."""
        table, parts = context.table, []
        seed = context.seed + repeat
        for inner, held in probe.folds(truth[rows], table["subject"].to_numpy(str)[rows], seed):
            entries = fit_predictors(context, probe, features, truth, rows[inner], baselines, self.pca_widths, seed)
            part = table.iloc[rows[held]][["subject", "session"]].assign(
                age=read_numbers(table.iloc[rows[held]], "age"), truth=truth[rows[held]], repeat=repeat
            )
            for key, entry in entries.items():
                prediction = entry.model.predict(features(key, entry.columns)[1][rows[held]])
                part[key] = prediction
                if probe.bias_correction:
                    part[f"{key}{UNBIASED}"] = entry.model.unbiased(prediction)
            parts.append(part)
        return pd.concat(parts)


class PooledFolds:
    """The test predictions of several runs, each trained without its fold (`data.split.fold`), put together.

    Every run has been through `evaluation=[probes]`; its baselines were fitted on the same training scans.
    """

    def __init__(self, probes: Mapping[str, Probe], runs: Sequence[str | Path], resamples: int = 1000):
        """`runs`: folders runs/<name>, one a fold."""
        self.probes, self.runs, self.resamples = dict(probes or {}), [Path(run) for run in runs], resamples

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        log.info("folds of %d runs, inductive: %s", len(self.runs), SAID["inductive"])
        for name, probe in self.probes.items():
            found = pd.concat([self._read(run, name) for run in self.runs], join="inner")
            twice = found.duplicated(["subject", "session"])
            if twice.any():
                raise UserError(
                    f"evaluation.folds.runs: {found[twice]['subject'].iloc[0]} is in the test fold of two runs; "
                    "give each run another data.split.fold"
                )
            yield from score_folds(context, name, probe, found.assign(repeat=0), "inductive", self.resamples)

    def _read(self, run: Path, name: str) -> pd.DataFrame:
        path = run / "evaluation" / f"{name}_predictions.csv"
        if not path.exists():
            raise UserError(f"no {path}: run `python evaluate.py evaluation=[probes] name={run.name} ...` first")
        return pd.read_csv(path, dtype={"subject": str, "session": str})


def score_folds(
    context: Context, name: str, probe: Probe, predictions: pd.DataFrame, regime: str, resamples: int
) -> Iterator[tuple[str, float]]:
    """Metrics of held-out predictions; columns subject, session, age, truth, repeat, and one a predictor."""
    about = ("subject", "session", "age", "truth", "repeat")
    keys = [column for column in predictions if column not in about and not column.endswith(UNBIASED)]
    repeats = [part.sort_values(["subject", "session"]) for _, part in predictions.groupby("repeat")]
    found: dict[str, dict[str, np.ndarray]] = {}
    for key in keys:
        parts = []
        for part in repeats:
            weights = draw_subject_weights(part["subject"], resamples, context.seed)
            values = part[key].to_numpy()
            unbiased = part.get(f"{key}{UNBIASED}", part[key]).to_numpy()
            parts.append(
                score_predictor(probe, part["truth"].to_numpy(), values, unbiased, part["age"].to_numpy(), weights)
            )
        metrics = set.intersection(*(set(part) for part in parts))
        found[key] = {metric: np.mean([part[metric] for part in parts], axis=0) for metric in sorted(metrics)}
    prefix = f"cv/{regime}/"
    yield from metrics_by_name(found, name, probe, repeats[0], prefix)
    yield f"{prefix}probe/{name}/repeats", float(len(repeats))
    stem = f"cv_{regime}_{name}"
    with replacing(context.out / f"{stem}_predictions.csv") as temporary:
        predictions.to_csv(temporary, index=False)
    truth = repeats[0]["truth"].to_numpy()
    first = {key: repeats[0][key].to_numpy() for key in keys}
    if probe.classes is None:
        figures.draw_scatter(
            context.out / f"{stem}_scatter.png",
            probe.column,
            figures.UNITS.get(probe.column, ""),
            truth,
            first[EMBEDDING],
        )
    else:
        figures.draw_roc_curves(context.out / f"{stem}_roc.png", truth, first)
