"""Does an edit along a label's direction do to a scan what the label does to a brain? Measured on test scans.

Each scan is inverted, y moved along the direction by a ladder of alpha, and decoded. The expected signs are those of
disease and of ageing: ventricles grow, hippocampi shrink. For phantoms see also counterfactuals.py.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ldae.data.subsampling import subsample_by_subject
from ldae.editing.directions import Direction, DirectionEstimator, find_direction
from ldae.editing.editor import Editor
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.edits.alpha_sweep import AlphaSweep, measure_reversibility, run_sweep, share_outside
from ldae.evaluation.edits.anatomy import Anatomy
from ldae.evaluation.edits.counterfactuals import FACTORS, calibrate_exchange_rate, compare_with_counterfactuals
from ldae.evaluation.edits.effects import slope, spearman, weighted_median
from ldae.evaluation.edits.heldout_probe import HeldOutProbe
from ldae.evaluation.edits.inverted_scans import invert_scans
from ldae.evaluation.edits.results import ManipulationResults
from ldae.evaluation.probes import scores
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise
from ldae.utils.errors import UserError
from ldae.utils.files import write_json

log = logging.getLogger(__name__)

EXPECTED = {"ventricle": 1, "hippocampus": -1}  # the sign of disease and of age
MONOTONE = 0.9


class Manipulation:
    """`manipulation/<probe>/...` for every probe with a direction, on test scans, with intervals over subjects.

    - `<structure>_spearman_share`: scans whose decoded volume follows alpha with Spearman >= 0.9 in the expected
      direction (ventricles grow, hippocampi shrink); `<structure>_slope`: mm3 per unit alpha.
    - `identity_ssim_mask`: SSIM in the brain of +-shown against alpha = 0; `outside_share`: part of the absolute change
      in the brain that lies outside the structures' regions, `outside_share_true` the same of the true change.
    - `reversibility_ssim_mask`: the edited scan, embedded anew and edited back, against alpha = 0.
    - `independent_*`: what a probe makes of it that shares no subject with the direction (independent.py).
    - On phantoms `difference_r`: correlation in the brain of the decoded with the true difference map, median over
      scans, `difference_r_ceiling` that of the autoencoder's own rendition of the true difference;
      `ventricle_error`: mm3 between decoded and true change, `ventricle_error_unedited` that of changing nothing;
      `ventricle_change_r`; `factor_per_alpha`: severity, or years, that one alpha stands for.
    """

    def __init__(
        self,
        probes: Mapping[str, Any],
        direction: DirectionEstimator,
        editor: Editor,
        alphas: Sequence[float] = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5),
        shown: float = 1.0,
        scans: int | None = 40,
        calibration_scans: int = 12,
        batch_size: int = 8,
        pictures: int = 2,
        resamples: int = 1000,
    ):
        """`shown`: the |alpha| of maps, identity and truth; `pictures` scans are drawn; `scans` at most (None: all)."""
        self.alphas = sorted(float(alpha) for alpha in alphas)
        if not {0.0, float(shown), -float(shown)} <= set(self.alphas) or shown <= 0:
            raise UserError(f"evaluation.manipulation: alphas must hold 0 and +-shown ({shown}), got {self.alphas}")
        self.probes, self.direction, self.editor = dict(probes or {}), direction, editor
        self.shown, self.scans, self.calibration_scans = float(shown), scans, calibration_scans
        self.batch_size, self.pictures, self.resamples = batch_size, pictures, resamples

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        anatomy, directions = Anatomy(context), {}
        rows = subsample_by_subject(context.rows("test"), context.table["subject"].tolist(), self.scans, context.seed)
        for name, probe in self.probes.items():
            train = context.rows("train")
            try:
                found = find_direction(self.direction, probe, context.table, context.embeddings, train, context.seed)
            except UserError as error:
                log.warning("manipulation of %s is skipped: %s", name, error)
                continue
            directions[name] = found.to_dict()
            yield from self._one(context, anatomy, name, probe, found, rows)
        about = {"weights": context.weights, "editor": vars(self.editor), "directions": directions}
        write_json(context.out / "directions.json", about)

    def _one(
        self, context: Context, anatomy: Anatomy, name: str, probe: Any, direction: Direction, rows: np.ndarray
    ) -> Iterator[tuple[str, float]]:
        from tqdm import tqdm

        rate = calibrate_exchange_rate(
            context, self.editor, anatomy, direction, FACTORS.get(probe.column), self.calibration_scans,
            self.batch_size, self.shown,
        )  # fmt: skip
        judge = HeldOutProbe.fit(context, probe, self.direction, self.shown)
        place = context.out / f"manipulation_{name}"
        measured = ManipulationResults(place, self.alphas, self.shown, self.pictures, context.spacing)
        for part in tqdm(list(iterate_batches(rows, self.batch_size)), f"manipulation of {name}"):
            opened = invert_scans(context, self.editor, anatomy, part)
            ladder = run_sweep(context, self.editor, anatomy, direction, opened, self.alphas)
            found, true = self._scan_numbers(context, anatomy, direction, ladder), None
            if rate is not None:
                effect = compare_with_counterfactuals(context, anatomy, rate, ladder, self.shown)
                found, true = found | effect.numbers, effect.difference
            if judge is not None:
                found |= judge.effect(context, self.editor, opened)
            measured.add(ladder, found, true, context.table.iloc[part], anatomy.region)
        weights = draw_subject_weights(context.table["subject"].to_numpy(str)[rows], self.resamples, context.seed)
        stem = f"manipulation/{name}"
        yield f"{stem}/scans", float(len(rows))
        if rate is not None:
            yield f"{stem}/factor_per_alpha", rate.per_alpha
        yield from summarise_dose_response(stem, self.alphas, measured.volumes(), weights)
        yield from summarise_scans(stem, measured.numbers(), weights)
        measured.write(context.table.iloc[rows])

    def _scan_numbers(
        self, context: Context, anatomy: Anatomy, direction: Direction, ladder: AlphaSweep
    ) -> dict[str, np.ndarray]:
        """(B,) each, of what needs no truth."""
        ends = (-self.shown, self.shown)
        places = [self.alphas.index(end) for end in ends]
        found = {"identity_ssim_mask": ladder.identity[:, places].mean(1)}
        if anatomy.region is not None:
            shares = [share_outside(ladder.change(end), ladder.brain, anatomy.region) for end in ends]
            found["outside_share"] = np.mean(shares, 0)
        found["reversibility_ssim_mask"] = measure_reversibility(context, self.editor, direction, ladder, self.shown)
        return found


def summarise_dose_response(
    stem: str, alphas: Sequence[float], volumes: Mapping[str, np.ndarray], weights: np.ndarray
) -> Iterator[tuple[str, float]]:
    """How each structure's volume (N, A) follows alpha."""
    alphas, total = np.asarray(alphas), weights.sum(1)
    for name, measured in volumes.items():
        rank, rise = EXPECTED[name] * spearman(alphas, measured), slope(alphas, measured)
        yield from summarise(f"{stem}/{name}_spearman_share", weights @ (rank >= MONOTONE) / total)
        yield f"{stem}/{name}_spearman_median", float(np.median(EXPECTED[name] * rank))
        yield from summarise(f"{stem}/{name}_slope", weights @ rise / total)
        middle = measured[:, alphas.tolist().index(0.0)]
        yield f"{stem}/{name}_slope_percent", float(100 * rise.mean() / middle.mean())


def summarise_scans(stem: str, values: Mapping[str, np.ndarray], weights: np.ndarray) -> Iterator[tuple[str, float]]:
    """Per-scan numbers (N,) as means, or medians for correlations of maps, with intervals."""
    for name, value in values.items():
        if name.startswith("difference_r"):
            yield from summarise(f"{stem}/{name}", weighted_median(value, weights))
        elif not name.startswith("change_"):
            yield from summarise(f"{stem}/{name}", weights @ value / weights.sum(1))
    if "change_true" in values:
        agreement = scores.pearson(values["change_true"], values["change_decoded"], weights)
        yield from summarise(f"{stem}/ventricle_change_r", agreement)
