"""The truth about an edit, known for phantoms alone: the same person, scanner and noise with another severity or age.

Alpha has no fixed exchange rate with severity or age. `exchange` measures one on VALIDATION scans: decoded growth of
the ventricles per alpha over their true growth per unit of the factor. The truth at alpha is rendered from it.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldae.data.subsampling import subsample_by_subject
from ldae.editing.directions import Direction
from ldae.editing.editor import Editor
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.edits.alpha_sweep import AlphaSweep, run_sweep, share_outside
from ldae.evaluation.edits.anatomy import Anatomy
from ldae.evaluation.edits.effects import correlation, slope
from ldae.evaluation.edits.inverted_scans import invert_scans
from ldae.evaluation.images.image_metrics import to_arrays

log = logging.getLogger(__name__)

NEEDED = ("phantom_seed", "severity", "path")
# Which of a phantom's factors a probe's column stands for.
FACTORS = {"diagnosis": "severity", "severity": "severity", "age": "age"}
# How far a factor is moved at most: beyond, the generator leaves the people it was made for.
LIMITS = {"severity": 1.2, "age": 25.0}
STEPS = {"severity": 0.25, "age": 5.0}  # for the true slope
LEAST = {"severity": 0.3, "age": 5.0}  # what +-alpha stands for at least: an edit that does nothing is not right


@dataclass(frozen=True)
class Counterfactual:
    """volume: (1, X, Y, Z) in model space; ventricle: mm3."""

    volume: Tensor
    ventricle: float


class CounterfactualRenderer:
    """Renders counterfactuals of a phantom table's rows and brings them to model space by the model's own transform."""

    def __init__(self, context: Context):
        self.table, self.transform = context.table, getattr(context.model, "transform", None)

    @property
    def available(self) -> bool:
        """Whether the cohort is of phantoms."""
        return self.transform is not None and all(column in self.table for column in NEEDED)

    def render(self, row: int, factor: str = "severity", change: float = 0.0) -> Counterfactual:
        """Scan `row` without noise, its `factor` ("severity", 1 = a typical patient, or "age", years) moved."""
        import nibabel

        from ldae.data.phantom import render

        entry = self.table.iloc[row]
        header = nibabel.load(entry["path"]).header
        moved = {factor: float(entry[factor]) + change}
        spacing, shape = float(header.get_zooms()[0]), header.get_data_shape()[:3]
        scan = render(entry, noise=False, spacing=spacing, shape=shape, **moved)
        image = nibabel.Nifti1Image(np.rint(scan.image).astype(np.int16), scan.affine)  # rounded as scans are stored
        return Counterfactual(torch.from_numpy(np.asarray(self.transform(image))), scan.volumes["ventricle"])

    def ventricle_slope(self, rows: Sequence[int], factor: str) -> float:
        """Mean true change of the ventricles per unit of `factor`, mm3; nothing is rendered."""
        from ldae.data.phantom.rendering import find_factors
        from ldae.data.phantom.subjects import target_volumes

        slopes, step = [], STEPS[factor]
        for row in rows:
            own = find_factors(self.table.iloc[row])
            ends = [own.changed(**{factor: getattr(own, factor) + sign * step}) for sign in (-1, 1)]
            below, above = (target_volumes(end)["ventricle"] for end in ends)
            slopes.append((above - below) / (2 * step))
        return float(np.mean(slopes))


@dataclass(frozen=True)
class ExchangeRate:
    """per_alpha: severity, or years, that alpha = 1 stands for."""

    source: CounterfactualRenderer
    factor: str
    per_alpha: float

    def change(self, alpha: float) -> float:
        """Of the factor at `alpha`, within the generator's limits."""
        limit = LIMITS[self.factor]
        return float(np.clip(alpha * self.per_alpha, -limit, limit))


def calibrate_exchange_rate(
    context: Context, editor: Editor, anatomy: Anatomy, direction: Direction, factor: str | None, scans: int,
    batch_size: int, alpha: float,
) -> ExchangeRate | None:  # fmt: skip
    """The exchange rate between 0 and +-alpha on validation scans; None without phantoms or label maps.

    A direction that moves ventricles the wrong way gets the same rate: its maps must come out anticorrelated. One that
    hardly moves them is held to the LEAST change.
    """
    source = CounterfactualRenderer(context)
    rows = subsample_by_subject(context.rows("val"), context.table["subject"].tolist(), scans, context.seed)
    if factor not in LIMITS or not source.available or "ventricle" not in anatomy.measures or not len(rows):
        return None
    alphas, slopes = [-alpha, 0.0, alpha], []
    for part in iterate_batches(rows, batch_size):
        opened = invert_scans(context, editor, anatomy, part)
        ladder = run_sweep(context, editor, anatomy, direction, opened, alphas)
        slopes.append(slope(np.array(alphas), ladder.volumes["ventricle"]))
    rate = float(np.nanmean(np.concatenate(slopes))) / source.ventricle_slope(rows, factor)
    if rate < 0:
        log.warning("this direction moves the ventricles of validation scans the wrong way (%.3g %s)", rate, factor)
    return ExchangeRate(source, factor, max(abs(rate), LEAST[factor] / alpha))


@dataclass(frozen=True)
class CounterfactualComparison:
    """One batch against its true counterfactuals at +-alpha.

    Attributes:
        numbers: (B,) each, see `compare`.
        difference: true change at +alpha, (B, X, Y, Z).
    """

    numbers: dict[str, np.ndarray]
    difference: np.ndarray


@torch.no_grad()
def compare_with_counterfactuals(
    context: Context, anatomy: Anatomy, rate: ExchangeRate, ladder: AlphaSweep, alpha: float, ceiling: bool = True
) -> CounterfactualComparison:
    """Decoded against true changes at -alpha and +alpha.

    `difference_r`: correlation in the brain of the difference maps, mean of both ends; `difference_r_ceiling`: of the
    autoencoder's rendition of the true change with it; `change_decoded`, `change_true`: ventricles, mm3, from -alpha
    to +alpha; `ventricle_error`: between them, `ventricle_error_unedited`: that of changing nothing.
    """
    ends, rows, brain = (-alpha, alpha), ladder.opened.rows, ladder.brain
    truths = {move: [rate.source.render(row, rate.factor, rate.change(move)) for row in rows] for move in (0.0, *ends)}
    volumes = {move: torch.stack([truth.volume for truth in found]) for move, found in truths.items()}
    true = {end: to_arrays(volumes[end] - volumes[0.0]) for end in ends}
    decoded = {end: ladder.change(end) for end in ends}
    found = {"difference_r": _correlations(decoded, true, brain)}
    if ceiling:
        passed = {move: context.model.decompress(context.model.compress(x)) for move, x in volumes.items()}
        found["difference_r_ceiling"] = _correlations(
            {end: to_arrays(passed[end] - passed[0.0]) for end in ends}, true, brain
        )
    if anatomy.region is not None:
        found["outside_share_true"] = np.mean([share_outside(true[end], brain, anatomy.region) for end in ends], 0)
    mm3 = {end: np.array([truth.ventricle for truth in truths[end]]) for end in ends}
    found["change_true"] = mm3[alpha] - mm3[-alpha]
    found["change_decoded"] = ladder.volume_change("ventricle", alpha) - ladder.volume_change("ventricle", -alpha)
    found["ventricle_error"] = np.abs(found["change_decoded"] - found["change_true"])
    found["ventricle_error_unedited"] = np.abs(found["change_true"])
    return CounterfactualComparison(found, true[alpha])


def _correlations(first: dict[float, np.ndarray], second: dict[float, np.ndarray], brain: np.ndarray) -> np.ndarray:
    """(B,) of maps (B, X, Y, Z), averaged over the ends."""
    values = [
        [correlation(a, b, mask) for a, b, mask in zip(first[end], second[end], brain, strict=True)] for end in first
    ]
    return np.mean(values, axis=0)
