"""Which labels can be read from y by a linear probe, and how much better than from simpler features?

`Probes` fits on the train split and tests once on the test split; `ExternalCohort` applies what `Probes` has stored to
every scan of another cohort. Scans without the label are not used.

Metrics, each with `_low` and `_high`, the 95 % interval of a bootstrap over subjects:

- `probe/<probe>/<metric>`: predictions from y. `scans` and `subjects` count what was tested.
- `baseline/<baseline>/<probe>/<metric>`: predictions from other features (baselines.py).
- `baseline/<baseline>/<probe>/<metric>_difference`: embedding minus baseline on the same resamples, with the sign
  chosen so that positive means that the embedding is better, for errors as for scores.
- `probe/<probe>/mae_share_to_volumes`: where the error of the embedding lies between always-the-mean (0) and region
  volumes (1).
- With a probe's `bias_correction`: `unbiased_mae`, and `gap_pearson` and `unbiased_gap_pearson`, the correlation of
  (predicted - true) with the true value before and after the correction.
- `baseline/pca_view_and_y/<probe>/<metric>_gain`: components of the view and y together, minus the components alone on
  the same resamples; positive = y tells more than the components.
- `baseline/untrained/<probe>/<metric>` is the mean over draws of the encoder's initial weights, the first of which
  started this training; `<metric>_spread` is the standard deviation over them.

- `baseline/supervised/<probe>/...`: predictions of the same encoder trained on the label itself (`stage=supervised`).

`ExternalCohort` prepends `external/`, or `external/<name>/`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ldae.data.table import scan_names
from ldae.editing.frozen_probes import EMBEDDING, FrozenProbe, read_frozen_probes, write_frozen_probes
from ldae.editing.linear_model import LinearModel
from ldae.evaluation.context import Context, Evaluator
from ldae.evaluation.other_cohort import EXTERNAL, file_prefix
from ldae.evaluation.probes.baselines import BASELINES, SUPERVISED, WIDTHS, Features, check_baselines
from ldae.evaluation.probes.fitted_predictors import Predictor, apply_frozen
from ldae.evaluation.probes.predictors import fit_predictors, score_predictors
from ldae.evaluation.probes.table_features import describe_values
from ldae.evaluation.probes.targets import Classification, Probe, Regression
from ldae.scans.ood_check import describe_rejected, find_rejected
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)


class Probes:
    """Fit every probe and baseline on `fit_splits`, score them on test, and store them frozen in `probes.json`.

    By default only train is used for fitting, so that val remains for choices that a user makes by labels.
    """

    def __init__(
        self,
        probes: Mapping[str, Probe],
        baselines: Sequence[str] = BASELINES,
        resamples: int = 1000,
        fit_splits: Sequence[str] = ("train",),
        baseline_visits_only: bool = False,
        pca_widths: Sequence[int] = WIDTHS,
        head_size: bool = False,
    ):
        """`head_size`: whether the head's size is a feature of every predictor; these probes are not stored."""
        check_baselines(baselines, "evaluation.probes.baselines")
        self.probes, self.baselines, self.resamples = dict(probes or {}), list(baselines), resamples
        self.fit_splits, self.baseline_visits_only = list(fit_splits), baseline_visits_only
        self.pca_widths, self.head_size = list(pca_widths), head_size

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        features, frozen = Features(context, self.pca_widths, self.head_size), {}
        for name, probe in self.probes.items():
            truth = probe.target(context.table)
            usable = np.isfinite(truth)
            if self.baseline_visits_only:
                usable &= find_first_visits(context.table)
            fit_rows, test_rows = (
                rows[usable[rows]] for rows in (context.rows(*self.fit_splits), context.rows("test"))
            )
            reason = self._reason_skipped(context, probe, truth, fit_rows, test_rows)
            if reason:
                context.skip(f"probe {name} is skipped: {reason}; {probe.describe_remedy(context.table, name)}")
                continue
            baselines = features.select_applicable(self.baselines, probe.column, fit_rows)
            predictors = fit_predictors(context, probe, features, truth, fit_rows, baselines, context.seed)
            frozen[name] = predictors
            scored = predictors | (find_supervised(context, name, probe) if SUPERVISED in self.baselines else {})
            yield from score_predictors(context, name, probe, scored, features, truth, test_rows, self.resamples)
        if self.head_size:
            context.skip("probes.json is not written: a probe that reads the head's size is none of y alone")
            return
        stored = {name: {key: one.freeze() for key, one in fitted.items()} for name, fitted in frozen.items()}
        write_frozen_probes(context.out / "probes.json", stored, context.weights)

    def _reason_skipped(
        self, context: Context, probe: Probe, truth: np.ndarray, fit_rows: np.ndarray, test_rows: np.ndarray
    ) -> str | None:
        for splits, rows, fitting in ((" + ".join(self.fit_splits), fit_rows, True), ("test", test_rows, False)):
            reason = probe.reason_unusable(truth[rows], context.subjects(rows), fitting)
            if reason:
                return f"{splits} has {reason}"
        return None


class ExternalCohort:
    """Apply the frozen probes and baselines of an earlier `evaluation=probes` to every scan of another cohort.

    Nothing is fitted, not even the scaling. `Context.prefix` says what the names of metrics, figures and predictions
    begin with. Scans that fail the model's out-of-distribution check are counted (`ood/failed` of `ood/scans`) and
    listed in `<prefix>ood.csv`; the other metrics include them.
    """

    def __init__(
        self,
        frozen: str | Path,
        name: str | None = None,
        resamples: int = 1000,
        baseline_visits_only: bool = False,
    ):
        """`frozen`: the probes.json that `evaluation=probes` wrote for the same encoder.

        `name`: of the cohort in the names of its metrics and files; see ldae.evaluation.other_cohort.
        """
        self.frozen, self.name = Path(frozen), name
        self.resamples, self.baseline_visits_only = resamples, baseline_visits_only

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        prefix = context.prefix or f"{EXTERNAL}/"
        features, table, scored = Features(context), context.table, 0
        probes = self.read_probes(context.weights)
        yield from self._check_distribution(context, prefix)
        for name, frozen in probes.items():
            probe = build_probe(frozen[EMBEDDING].model)
            truth = probe.target(table)
            usable = np.isfinite(truth)
            if self.baseline_visits_only:
                usable &= find_first_visits(table)
            rows = np.flatnonzero(usable)
            reason = probe.reason_unusable(truth[rows], context.subjects(rows), fitting=False)
            if reason:
                remedy = f"{describe_values(table, probe.column)}, the probe was fitted on {describe_labels(probe)}"
                context.skip(f"external probe {name} is skipped: the cohort has {reason}; {remedy}")
                continue
            scored += 1
            predictors = apply_frozen(frozen, features) | find_supervised(context, name, probe)
            yield from score_predictors(context, name, probe, predictors, features, truth, rows, self.resamples, prefix)
        if not scored:
            reasons = "; ".join(context.skipped) or f"{self.frozen} has no probe"
            raise UserError(f"no probe could be applied to {context.source.table or 'this cohort'}: {reasons}")

    def read_probes(self, weights: str) -> dict[str, dict[str, FrozenProbe]]:
        """The frozen predictors of each probe; see `read_frozen_probes`."""
        return read_frozen_probes(self.frozen, weights, with_scans=True)

    def _check_distribution(self, context: Context, prefix: str) -> Iterator[tuple[str, float]]:
        check = getattr(context.model, "ood_check", None)
        if check is None:
            context.skip(
                "the out-of-distribution check is skipped: this model has none (encode_latents.py measures it)"
            )
            return
        table = context.table
        rejected = find_rejected(check, context.volumes, range(len(table)))
        log.info("%s", describe_rejected(rejected, scan_names(table, range(len(table))), len(table)))
        columns = [name for name in ("subject", "session", "path") if name in table]
        listed = table.iloc[list(rejected)][columns].assign(reason=list(rejected.values()))
        context.write_csv(f"{file_prefix(prefix)}ood.csv", listed)
        yield f"{prefix}ood/scans", float(len(table))
        yield f"{prefix}ood/failed", float(len(rejected))


def find_scored_probes(evaluators: Mapping[str, Evaluator], weights: str) -> list[str]:
    """The names of the probes beside which supervised networks will be scored.

    Args:
        weights: of the model, see `read_frozen_probes`.
    """
    names: list[str] = []
    for evaluator in evaluators.values():
        if isinstance(evaluator, Probes) and SUPERVISED in evaluator.baselines:
            names += evaluator.probes
        elif isinstance(evaluator, ExternalCohort):
            names += evaluator.read_probes(weights)
    return names


def find_supervised(context: Context, name: str, probe: Probe) -> dict[str, Predictor]:
    """The supervised network for a probe, by the name of the baseline; empty, with a line in the log, without one."""
    if context.supervised is None:
        return {}
    reason = context.supervised.reason_absent(name, probe)
    if reason:
        context.skip(f"baseline {SUPERVISED} is not computed for {name}: {reason}")
        return {}
    return {SUPERVISED: context.supervised.predictor(name, probe)}


def build_probe(model: LinearModel) -> Probe:
    """The probe that a stored model was fitted as."""
    if model.classes is None:
        return Regression(model.column, bias_correction=model.bias is not None)
    return Classification(model.column, positive=model.classes[1], negative=model.classes[0])


def describe_labels(probe: Probe) -> str:
    """The labels of a probe in words."""
    return "numbers" if probe.classes is None else f"{probe.classes[1]} (positive) and {probe.classes[0]}"


def find_first_visits(table: pd.DataFrame) -> np.ndarray:
    """Whether each row is its subject's earliest session, (N,) bool."""
    first = table.groupby("subject")["months"].transform("min")
    return (table["months"] == first).to_numpy()
