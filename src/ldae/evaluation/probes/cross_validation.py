"""How well do probes and baselines predict a label in cohorts that are too small for a test split?

Repeated cross-validation by subject, with the same folds for the embedding and all baselines. Two regimes are kept
apart. *Transductive*: the encoder saw the scans without their labels (splits train and val). *Inductive*: it saw none
of the predicted scans, which are either one run's test split (`CrossValidation`) or the test folds of several runs,
each trained without its fold (`PooledFolds`). In both, no probe sees the labels of the fold that it predicts.

Baselines know as much as the encoder. Transductive: principal components (of the view, the scans, the latents) are
those of the training scans, without labels, as the encoder's own are. Inductive: they are fitted on the scans that the
probe is fitted on. Scaling, penalty and slopes are fitted on each fold's own fitting rows in both.

Metrics: `cv/<regime>/probe/<probe>/<metric>` and `cv/<regime>/baseline/<baseline>/<probe>/<metric>`, with intervals and
paired differences as in evaluator.py, and `cv/<regime>/probe/<probe>/repeats`. A metric is computed from all held-out
predictions of one repeat and averaged over repeats; the bootstrap draws subjects.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ldae.evaluation.context import Context
from ldae.evaluation.probes.baselines import BASELINES, SUPERVISED, WIDTHS, Features, check_baselines
from ldae.evaluation.probes.bootstrap import draw_subject_weights
from ldae.evaluation.probes.predictors import (
    UNBIASED,
    draw_predictions,
    fit_predictors,
    metrics_by_name,
    score_predictor,
)
from ldae.evaluation.probes.table_features import read_numbers
from ldae.evaluation.probes.targets import Probe
from ldae.runs import Run
from ldae.utils.errors import UserError
from ldae.utils.results_record import read_record

log = logging.getLogger(__name__)

REGIMES = {"transductive": ("train", "val"), "inductive": ("test",)}  # with the splits that are divided into folds
SCAN_COLUMNS = ("subject", "session", "age", "truth", "repeat")  # of predictions; the others are predictors
SEEN_BY_ENCODER = ("transductive",)
REGIME_TEXT = {
    "transductive": "the encoder saw these scans, without labels",
    "inductive": "the encoder saw none of these scans",
}


class CrossValidation:
    """Probes fitted and tested in folds of one regime's scans; five folds per repeat."""

    def __init__(
        self,
        probes: Mapping[str, Probe],
        regime: str = "transductive",
        baselines: Sequence[str] = BASELINES,
        repeats: int = 5,
        resamples: int = 1000,
        pca_widths: Sequence[int] = WIDTHS,
        head_size: bool = False,
    ):
        """`repeats`: how often the folds are drawn anew. `head_size`: whether every predictor reads the head's size."""
        if regime not in REGIMES:
            raise UserError(f"evaluation.cross_validation.regime={regime}: one of {', '.join(REGIMES)} is needed")
        check_baselines(baselines, "evaluation.cross_validation.baselines")
        self.probes, self.regime, self.baselines = dict(probes or {}), regime, list(baselines)
        self.repeats, self.resamples = repeats, resamples
        self.pca_widths, self.head_size = list(pca_widths), head_size

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        splits = REGIMES[self.regime]
        rows_of_regime = context.rows(*splits)
        # What the encoder was trained on, principal components are fitted on as well, likewise without labels.
        known_rows = context.rows("train") if self.regime in SEEN_BY_ENCODER else None
        features = Features(context, self.pca_widths, self.head_size, known_rows)
        if SUPERVISED in self.baselines:
            context.skip(
                f"baseline {SUPERVISED} is not computed in cross-validation: each fold needs a network of "
                "its own; evaluation=[folds] pools runs that each have one"
            )
        log.info("cross-validation, %s: %s (%d)", self.regime, REGIME_TEXT[self.regime], len(rows_of_regime))
        for name, probe in self.probes.items():
            truth = probe.target(context.table)
            rows = rows_of_regime[np.isfinite(truth[rows_of_regime])]
            reason = probe.reason_unusable(truth[rows], context.subjects(rows), fitting=True)
            if reason:
                remedy = probe.describe_remedy(context.table, name)
                context.skip(f"probe {name} is skipped: splits {' + '.join(splits)} have {reason}; {remedy}")
                continue
            baselines = features.select_applicable(self.baselines, probe.column, rows)
            predictions = [
                self._predict_folds(context, probe, features, baselines, truth, rows, repeat)
                for repeat in range(self.repeats)
            ]
            yield from score_folds(context, name, probe, pd.concat(predictions), self.regime, self.resamples)

    def _predict_folds(
        self,
        context: Context,
        probe: Probe,
        features: Features,
        baselines: Sequence[str],
        truth: np.ndarray,
        rows: np.ndarray,
        repeat: int,
    ) -> pd.DataFrame:
        """The held-out predictions of one repeat, one row per scan; see `score_folds` for the columns."""
        table, parts, seed = context.table, [], context.seed + repeat
        for inner, held in probe.folds(truth[rows], context.subjects(rows), seed):
            predictors = fit_predictors(context, probe, features, truth, rows[inner], baselines, seed)
            part = table.iloc[rows[held]][["subject", "session"]].assign(
                age=read_numbers(table.iloc[rows[held]], "age"), truth=truth[rows[held]], repeat=repeat
            )
            for key, predictor in predictors.items():
                part[key] = prediction = predictor.predict(rows[held])
                if probe.bias_correction:
                    part[f"{key}{UNBIASED}"] = predictor.unbiased(prediction)
            parts.append(part)
        return pd.concat(parts)


class PooledFolds:
    """The test predictions of several runs, each trained without its fold (`data.split.fold`), scored together.

    Each run must have been through `evaluation=[probes]`, which fitted its baselines on the same training scans. Folds
    that were drawn several times (`data.split.seed`) are averaged over the draws, each of which must be complete.
    """

    def __init__(self, probes: Mapping[str, Probe], runs: Sequence[str | Path], resamples: int = 1000):
        """`runs`: folders runs/<name>, one per fold and draw."""
        self.probes, self.runs, self.resamples = dict(probes or {}), [Path(run) for run in runs], resamples

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        log.info("test folds of %d runs, inductive: %s", len(self.runs), REGIME_TEXT["inductive"])
        draws = [_draw_of_folds(run) for run in self.runs]
        for name, probe in self.probes.items():
            parts = [self._read(run, name).assign(repeat=draw) for run, draw in zip(self.runs, draws, strict=True)]
            predictions = pd.concat(parts, join="inner")
            self._check(predictions)
            yield from score_folds(context, name, probe, predictions, "inductive", self.resamples)

    def _check(self, predictions: pd.DataFrame) -> None:
        """Refuse subjects that are in two folds of a draw, and draws of different subjects."""
        repeated = predictions.duplicated(["subject", "session", "repeat"])
        if repeated.any():
            raise UserError(
                f"evaluation.folds.runs: {predictions[repeated]['subject'].iloc[0]} is in the test fold of two "
                "runs; give each run another data.split.fold, or another data.split.seed"
            )
        counts = predictions.groupby(["subject", "session"])["repeat"].nunique()
        incomplete = counts[counts < predictions["repeat"].nunique()]
        if len(incomplete):
            raise UserError(
                f"evaluation.folds.runs: {incomplete.index[0][0]} and {len(incomplete) - 1} other scans are in no test "
                "fold of some data.split.seed: give all folds of each"
            )

    def _read(self, run: Path, name: str) -> pd.DataFrame:
        path = run / "evaluation" / f"{name}_predictions.csv"
        if not path.exists():
            raise UserError(f"no {path}: run `python evaluate.py evaluation=[probes] name={run.name} ...` first")
        refuse_outdated(run)
        return pd.read_csv(path, dtype={"subject": str, "session": str})


def _draw_of_folds(run: Path) -> int:
    """`data.split.seed` of a run, which says in which draw of the folds its fold is; 0 without a config."""
    stage = Run(run / "repr")
    return int(stage.config.data.split.seed) if (stage.path / "config.yaml").exists() else 0


def refuse_outdated(run: Path) -> None:
    """Refuse predictions of other weights than `run` has now.

    Raises:
        UserError: its encoder has been trained again since.
    """
    probes, stage = read_record(run / "evaluation").get("probes"), Run(run / "repr")
    if probes is not None and stage.published and probes.source.weights.get("encoder") != stage.sha256("encoder"):
        raise UserError(
            f"{run / 'evaluation'} has predictions of other weights than {stage.path}: run `python evaluate.py "
            f"evaluation=[probes] name={run.name} ...` again"
        )


def score_folds(
    context: Context, name: str, probe: Probe, predictions: pd.DataFrame, regime: str, resamples: int
) -> Iterator[tuple[str, float]]:
    """Metrics of held-out predictions.

    Args:
        predictions: columns subject, session, age, truth, repeat; one per predictor, named after it; with a bias
            correction also `<predictor>:unbiased`.
    """
    repeats = [part.sort_values(["subject", "session"]) for _, part in predictions.groupby("repeat")]
    scores = average_scores(context, probe, list(predictions), repeats, resamples)
    prefix, stem = f"cv/{regime}/", f"cv_{regime}_{name}"
    yield from metrics_by_name(scores, name, probe, repeats[0], prefix)
    yield f"{prefix}probe/{name}/repeats", float(len(repeats))
    context.write_csv(f"{stem}_predictions.csv", predictions)
    first = {key: repeats[0][key].to_numpy() for key in scores}
    draw_predictions(context.out, stem, probe, repeats[0]["truth"].to_numpy(), first)


def average_scores(
    context: Context, probe: Probe, columns: Sequence[str], repeats: Sequence[pd.DataFrame], resamples: int
) -> dict[str, dict[str, np.ndarray]]:
    """Metrics of every predictor among the `columns` of tables of predictions (see `score_folds`), (1 + R,) each.

    They are averaged over the tables, which have the same scans in the same order.
    """
    keys = [column for column in columns if column not in SCAN_COLUMNS and not column.endswith(UNBIASED)]
    return {key: _mean_scores(context, probe, key, repeats, resamples) for key in keys}


def _mean_scores(
    context: Context, probe: Probe, key: str, repeats: Sequence[pd.DataFrame], resamples: int
) -> dict[str, np.ndarray]:
    """Metrics of one predictor, (1 + R,) each, averaged over the repeats; a metric that a repeat lacks is left out."""
    scores = []
    for part in repeats:
        weights = draw_subject_weights(part["subject"], resamples, context.seed)
        unbiased = part.get(f"{key}{UNBIASED}", part[key]).to_numpy()
        truth, age = part["truth"].to_numpy(), part["age"].to_numpy()
        scores.append(score_predictor(probe, truth, part[key].to_numpy(), unbiased, age, weights))
    metrics = set.intersection(*(set(found) for found in scores))
    return {metric: np.mean([found[metric] for found in scores], axis=0) for metric in sorted(metrics)}
