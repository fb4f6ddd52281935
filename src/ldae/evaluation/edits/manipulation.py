"""Does an edit along a label's direction change a scan as the label changes a brain?

Scans are inverted, their y is moved along the direction by several values of alpha, and they are decoded. alpha = 1 is
the mean distance between the two classes in the training scans, or one standard deviation of a number (`conf/alpha`).
The changes of structures are compared with those that the label causes or goes along with (dose_response.py), on
phantoms with true counterfactuals (counterfactuals.py).

Metrics for every probe that has a direction, `manipulation/<probe>/...`, with intervals over subjects:

- `scans`: how many scans were edited, test scans unless `splits` says otherwise.
- `<structure>_spearman_share`: share of the scans whose decoded volume follows alpha with a Spearman correlation of at
  least 0.9 in the right direction; `<structure>_spearman_median`: the median correlation;
  `<structure>_slope`, `<structure>_slope_percent`: change per unit of alpha, in mm3 and in percent;
  `<structure>_slope_per_10_years`: of a direction of age. Structures: ventricle, and by registration hippocampus,
  amygdala and inferior_lateral_ventricle, as far as the label maps have them.
- `<structure>_right`: share of the scans whose slope has the right sign; `<structure>_moves`: 1 if the mean slope has
  the right sign with its interval and is at least a tenth of the right slope; otherwise 0: this direction cannot move
  the structure.
- `<structure>_slope_cohort`: slope of the training scans' own volumes on the label, per unit of alpha. On phantoms
  `<structure>_slope_true`: of the true counterfactuals; `<structure>_slope_seen`: what the same measurement sees of
  them after the autoencoder; `<structure>_slope_ratio`: the edits' slope over the latter, or else over the former.
- `identity_ssim_mask`: SSIM in the brain of +-shown to alpha = 0.
- `outside_share`: share of the absolute change in the brain that is outside the structures' regions;
  `outside_share_true`: the same of the true change.
- `reversibility_ssim_mask`: SSIM in the brain to alpha = 0 of the edited scan, embedded anew and edited back.
- `independent_slope`, `independent_right`: what a probe that shares no subject with the direction makes of the edit
  (heldout_probe.py).
- On phantoms `difference_r`, `difference_r_ceiling`, `ventricle_error`, `ventricle_error_unedited`
  (counterfactuals.py), correlations as medians over scans; `ventricle_change_r`: correlation over scans of decoded and
  true growth of the ventricles; `factor_per_alpha`: severity, or years, that corresponds to alpha = 1 by the growth
  of the ventricles; `factor_per_alpha_expected`: by the unit of alpha.

Training scans can be edited, too (`splits`). The direction that is evaluated is then fitted without their subjects, so
that no scan is edited along a direction that it has helped to find. directions.json contains the directions of all
training scans, for `ldae manipulate`; results.py lists the tables and figures.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ldae.data.subsampling import subsample_by_subject
from ldae.editing.direction import Direction
from ldae.editing.directions import TRAINING_DISTANCE, DirectionEstimator, find_direction
from ldae.editing.editor import Editor
from ldae.editing.units import AlphaUnit
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.edits.alpha_sweep import AlphaSweep, measure_reversibility, run_sweep, share_outside
from ldae.evaluation.edits.anatomy import Anatomy
from ldae.evaluation.edits.counterfactuals import (
    FACTORS,
    SEEN,
    TRUE,
    ExchangeRate,
    calibrate_exchange_rate,
    compare_with_counterfactuals,
)
from ldae.evaluation.edits.dose_response import (
    measure_cohort_slopes,
    moves,
    right_slopes,
    summarise_dose_response,
)
from ldae.evaluation.edits.effects import slope, weighted_median
from ldae.evaluation.edits.heldout_probe import HeldOutProbe
from ldae.evaluation.edits.inverted_scans import invert_scans
from ldae.evaluation.edits.results import ManipulationResults
from ldae.evaluation.probes import scores
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise, summarise_mean
from ldae.evaluation.probes.targets import Probe
from ldae.utils.errors import UserError
from ldae.utils.files import write_json

log = logging.getLogger(__name__)


class Manipulation:
    """The evaluation that the module describes.

    Args:
        direction: estimates the direction of each probe.
        alphas: values of alpha, 0 and +-shown among them.
        shown: the |alpha| at which identity, difference maps and counterfactuals are measured, and of the pictures.
        scans: at most this many scans; None: all of them.
        calibration_scans: at most this many validation scans, for the exchange rate of alpha.
        pictures: how many scans are drawn.
        unit: of alpha.
        splits: whose scans are edited; [train] if labels were not used in training and all scans are in train.
    """

    def __init__(
        self,
        probes: Mapping[str, Probe],
        direction: DirectionEstimator,
        editor: Editor,
        alphas: Sequence[float] = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
        shown: float = 1.0,
        scans: int | None = 40,
        calibration_scans: int = 12,
        batch_size: int = 8,
        pictures: int = 2,
        resamples: int = 1000,
        unit: AlphaUnit = TRAINING_DISTANCE,
        splits: Sequence[str] = ("test",),
    ):
        self.alphas = sorted(float(alpha) for alpha in alphas)
        if not {0.0, float(shown), -float(shown)} <= set(self.alphas) or shown <= 0:
            raise UserError(f"evaluation.manipulation: alphas must contain 0 and +-shown ({shown}), got {self.alphas}")
        self.probes, self.direction, self.editor = dict(probes or {}), direction, editor
        self.shown, self.scans, self.calibration_scans = float(shown), scans, calibration_scans
        self.batch_size, self.pictures, self.resamples = batch_size, pictures, resamples
        self.unit, self.splits = unit, list(splits)

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        anatomy, directions = Anatomy(context), {}
        rows, train = context.rows(*self.splits), context.rows("train")
        rows = subsample_by_subject(rows, context.table["subject"].tolist(), self.scans, context.seed)
        if not len(rows):
            names = " + ".join(self.splits)
            context.skip(f"manipulation is skipped: {names} has no scans; see evaluation.manipulation.splits")
            return
        others = train[~np.isin(context.subjects(train), context.subjects(rows))]
        for name, probe in self.probes.items():
            try:
                found = self._find(context, probe, train)
                evaluated = found if len(others) == len(train) else self._find(context, probe, others)
            except UserError as error:
                context.skip(f"manipulation of {name} is skipped: {error}")
                continue
            directions[name] = found.to_dict()
            yield from self._evaluate_direction(context, anatomy, name, probe, evaluated, rows)
        stored = {"weights": context.weights, "editor": vars(self.editor), "directions": directions}
        write_json(context.out / "directions.json", stored)

    def _find(self, context: Context, probe: Probe, rows: np.ndarray) -> Direction:
        return find_direction(self.direction, probe, context.table, context.embeddings, rows, context.seed, self.unit)

    def _evaluate_direction(
        self, context: Context, anatomy: Anatomy, name: str, probe: Probe, direction: Direction, rows: np.ndarray
    ) -> Iterator[tuple[str, float]]:
        from tqdm import tqdm

        rate = calibrate_exchange_rate(
            context, self.editor, anatomy, direction, FACTORS.get(probe.column), self.calibration_scans,
            self.batch_size, self.shown,
        )  # fmt: skip
        held_out = HeldOutProbe.fit(context, probe, self.direction, self.shown, self.unit)
        results = ManipulationResults(context, name, self.alphas, self.shown, self.pictures)
        for part in tqdm(list(iterate_batches(rows, self.batch_size)), f"manipulation of {name}"):
            scans = invert_scans(context, self.editor, anatomy, part)
            sweep = run_sweep(context, self.editor, anatomy, direction, scans, self.alphas, register=True)
            metrics, true_difference = self._measure(context, anatomy, direction, sweep), None
            if rate is not None:
                comparison = compare_with_counterfactuals(context, anatomy, rate, sweep, self.shown)
                metrics, true_difference = metrics | comparison.metrics, comparison.difference
            if held_out is not None:
                metrics |= held_out.measure(context, self.editor, sweep)
            results.add(sweep, metrics, true_difference, anatomy.region)
        yield from self._summarise(context, name, probe, direction, rate, rows, results)

    def _summarise(
        self,
        context: Context,
        name: str,
        probe: Probe,
        direction: Direction,
        rate: ExchangeRate | None,
        rows: np.ndarray,
        results: ManipulationResults,
    ) -> Iterator[tuple[str, float]]:
        weights = draw_subject_weights(context.subjects(rows), self.resamples, context.seed)
        volumes, metrics, stem = results.volumes(), results.metrics(), f"manipulation/{name}"
        yield f"{stem}/scans", float(len(rows))
        if rate is not None:
            yield f"{stem}/factor_per_alpha", rate.per_alpha
            if rate.expected is not None:
                yield f"{stem}/factor_per_alpha_expected", rate.expected
        cohort = measure_cohort_slopes(context, probe, direction, list(volumes), self.resamples)
        right = right_slopes(metrics, None if rate is None else rate.expected, cohort, list(volumes))
        yield from summarise_dose_response(stem, self.alphas, volumes, weights, right, direction)
        yield from summarise_scans(stem, metrics, weights)
        slopes = {key: slope(np.array(self.alphas), measured) for key, measured in volumes.items()}
        still = [key for key, found in slopes.items() if not moves(found, weights, right[key], key)]
        if still:
            log.warning("edits along %s cannot move: %s", name, ", ".join(still))
        results.write(rows, direction.alpha_scale.meaning, still)

    def _measure(
        self, context: Context, anatomy: Anatomy, direction: Direction, sweep: AlphaSweep
    ) -> dict[str, np.ndarray]:
        """The metrics that need no counterfactual, (B,) each."""
        ends = (-self.shown, self.shown)
        metrics = {"identity_ssim_mask": sweep.identity[:, [self.alphas.index(end) for end in ends]].mean(1)}
        if anatomy.region is not None:
            shares = [share_outside(sweep.difference_at(end), sweep.brain, anatomy.region) for end in ends]
            metrics["outside_share"] = np.mean(shares, 0)
        metrics["reversibility_ssim_mask"] = measure_reversibility(context, self.editor, direction, sweep, self.shown)
        return metrics


def summarise_scans(stem: str, values: Mapping[str, np.ndarray], weights: np.ndarray) -> Iterator[tuple[str, float]]:
    """Metrics per scan (N,) as means, those of difference maps as medians."""
    for name, value in values.items():
        if name.startswith("difference_r"):
            yield from summarise(f"{stem}/{name}", weighted_median(value, weights))
        elif not name.startswith(("change_", TRUE, SEEN)):
            yield from summarise_mean(f"{stem}/{name}", value, weights)
    if "change_true" in values:
        agreement = scores.pearson(values["change_true"], values["change_decoded"], weights)
        yield from summarise(f"{stem}/ventricle_change_r", agreement)
