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

`ExternalCohort` prepends `external/`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ldae.editing.frozen_probes import EMBEDDING, read_frozen_probes, write_frozen_probes
from ldae.evaluation.context import Context
from ldae.evaluation.probes.baselines import BASELINES, CHOICES, Features
from ldae.evaluation.probes.predictors import fit_predictors, score_predictors
from ldae.evaluation.probes.targets import Classification, Probe, Regression
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
        pca_widths: Sequence[int] = (8, 16, 32, 64, 128),
    ):
        check_baselines(baselines, "evaluation.probes.baselines")
        self.probes, self.baselines, self.resamples = dict(probes or {}), list(baselines), resamples
        self.fit_splits, self.baseline_visits_only = list(fit_splits), baseline_visits_only
        self.pca_widths = list(pca_widths)

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        features, frozen = Features(context), {}
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
                log.warning("probe %s is skipped: %s", name, reason)
                continue
            baselines = features.select_applicable(self.baselines, probe.column)
            predictors = fit_predictors(
                context, probe, features, truth, fit_rows, baselines, self.pca_widths, context.seed
            )
            frozen[name] = predictors
            yield from score_predictors(context, name, probe, predictors, features, truth, test_rows, self.resamples)
        write_frozen_probes(context.out / "probes.json", frozen, context.weights)

    def _reason_skipped(
        self, context: Context, probe: Probe, truth: np.ndarray, fit_rows: np.ndarray, test_rows: np.ndarray
    ) -> str | None:
        for splits, rows, fitting in ((" + ".join(self.fit_splits), fit_rows, True), ("test", test_rows, False)):
            reason = probe.reason_unusable(truth[rows], context.subjects(rows), fitting)
            if reason:
                return f"{splits} has {reason}"
        return None


def check_baselines(names: Sequence[str], key: str) -> None:
    """Refuse an unknown baseline, naming the config's `key`."""
    unknown = sorted(set(names) - set(CHOICES))
    if unknown:
        raise UserError(f"{key}: unknown {unknown[0]!r}, choose from {', '.join(CHOICES)}")


class ExternalCohort:
    """Apply the frozen probes and baselines of an earlier `evaluation=probes` to every scan of another cohort.

    Nothing is fitted, not even the scaling. Names of figures and predictions begin with `external_`.
    """

    def __init__(self, frozen: str | Path, resamples: int = 1000, baseline_visits_only: bool = False):
        """`frozen` is the probes.json that `evaluation=probes` wrote for the same encoder."""
        self.frozen, self.resamples, self.baseline_visits_only = Path(frozen), resamples, baseline_visits_only

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        features, table = Features(context), context.table
        for name, predictors in read_frozen_probes(self.frozen, context.weights).items():
            model = predictors[EMBEDDING].model
            probe: Probe = Regression(model.column, bias_correction=model.bias is not None)
            if model.classes is not None:
                probe = Classification(model.column, positive=model.classes[1], negative=model.classes[0])
            truth = probe.target(table)
            usable = np.isfinite(truth)
            if self.baseline_visits_only:
                usable &= find_first_visits(table)
            rows = np.flatnonzero(usable)
            reason = probe.reason_unusable(truth[rows], context.subjects(rows), fitting=False)
            if reason:
                log.warning("external probe %s is skipped: the cohort has %s", name, reason)
                continue
            yield from score_predictors(
                context, name, probe, predictors, features, truth, rows, self.resamples, "external/"
            )


def find_first_visits(table: pd.DataFrame) -> np.ndarray:
    """Whether each row is its subject's earliest session, (N,) bool."""
    first = table.groupby("subject")["months"].transform("min")
    return (table["months"] == first).to_numpy()
