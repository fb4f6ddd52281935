"""Does an edit change a phantom as a true change of severity or age would?

The true counterfactual of an edit is known for phantoms only: the same subject, scanner and noise-free scan with
another severity or age. How much severity (or age) corresponds to alpha is measured on VALIDATION scans: the growth of
the decoded ventricles per unit of alpha over their true growth per unit of the factor. The counterfactual that an edit
by alpha is compared with is rendered at this rate.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldae.editing.direction import Direction
from ldae.editing.editor import Editor
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.edits.alpha_sweep import AlphaSweep, run_sweep, share_outside
from ldae.evaluation.edits.anatomy import REGIONS, Anatomy
from ldae.evaluation.edits.effects import correlation, slope
from ldae.evaluation.edits.inverted_scans import invert_scans
from ldae.evaluation.images.image_metrics import to_arrays

log = logging.getLogger(__name__)

PHANTOM_COLUMNS = ("phantom_seed", "severity", "path")
FACTORS = {"diagnosis": "severity", "severity": "severity", "age": "age"}  # column of a probe -> factor of a phantom
TRUE, SEEN = "true_", "seen_"  # begin the names of true changes of structures
MAX_CHANGE = {"severity": 1.2, "age": 25.0}  # larger changes leave the range that phantoms are generated for
STEPS = {"severity": 0.25, "age": 5.0}  # of the finite difference for the true slope
# The least change that +-alpha is compared with, so that an edit without effect is not scored as correct.
MIN_CHANGE = {"severity": 0.3, "age": 5.0}


@dataclass(frozen=True)
class Counterfactual:
    """A rendered phantom.

    Attributes:
        volume: (1, X, Y, Z) in model space.
        volumes: true volumes of its structures, mm3.
    """

    volume: Tensor
    volumes: Mapping[str, float]


class CounterfactualRenderer:
    """Renders counterfactuals of a phantom table's rows and brings them to model space by the model's transform."""

    def __init__(self, context: Context):
        self.table, self.transform = context.table, context.model.transform

    @property
    def available(self) -> bool:
        """Whether the cohort consists of phantoms."""
        return self.transform is not None and all(column in self.table for column in PHANTOM_COLUMNS)

    def render(self, row: int, factor: str = "severity", change: float = 0.0) -> Counterfactual:
        """Scan `row` without noise, its factor changed.

        Args:
            factor: "severity" (1 = a typical patient) or "age" (years).
        """
        return self._render(row, {factor: float(self.table.iloc[row][factor]) + change})

    def render_later(self, row: int, later: int) -> Counterfactual:
        """Scan `row` without noise, its scanner and contrast kept, with the anatomy of another visit of the subject."""
        return self._render(row, {factor: float(self.table.iloc[later][factor]) for factor in ("severity", "age")})

    def _render(self, row: int, changed: Mapping[str, float]) -> Counterfactual:
        import nibabel

        from ldae.data.phantom import render

        entry = self.table.iloc[row]
        header = nibabel.load(entry["path"]).header
        spacing, shape = float(header.get_zooms()[0]), header.get_data_shape()[:3]
        scan = render(entry, noise=False, spacing=spacing, shape=shape, **changed)
        image = nibabel.Nifti1Image(np.rint(scan.image).astype(np.int16), scan.affine)  # rounded as stored scans are
        return Counterfactual(torch.from_numpy(np.asarray(self.transform(image))), scan.volumes)

    def ventricle_slope(self, rows: Sequence[int], factor: str) -> float:
        """Mean true change of the ventricle volume per unit of `factor`, mm3; nothing is rendered."""
        from ldae.data.phantom.rendering import find_factors
        from ldae.data.phantom.subjects import target_volumes

        slopes, step = [], STEPS[factor]
        for row in rows:
            own = find_factors(self.table.iloc[row])
            ends = [own.changed(**{factor: getattr(own, factor) + sign * step}) for sign in (-1, 1)]
            below, above = (target_volumes(end)["ventricle"] for end in ends)
            slopes.append((above - below) / (2 * step))
        return float(np.mean(slopes))


class CachedCounterfactuals:
    """Renders each counterfactual only once."""

    def __init__(self, renderer: CounterfactualRenderer):
        self._renderer, self._rendered = renderer, {}

    def render(self, row: int, factor: str = "severity", change: float = 0.0) -> Counterfactual:
        """See CounterfactualRenderer.render."""
        key = (row, factor, round(change, 6))
        if key not in self._rendered:
            self._rendered[key] = self._renderer.render(row, factor, change)
        return self._rendered[key]


@dataclass(frozen=True)
class ExchangeRate:
    """How a change of alpha converts to a change of a phantom's factor.

    Attributes:
        renderer: of the counterfactuals.
        per_alpha: severity, or years, that corresponds to alpha = 1.
        expected: severity, or years, that alpha = 1 is by its unit; None if that is not known.
    """

    renderer: CounterfactualRenderer | CachedCounterfactuals
    factor: str
    per_alpha: float
    expected: float | None = None

    def change(self, alpha: float) -> float:
        """The change of the factor that corresponds to `alpha`, within the range of the generator."""
        limit = MAX_CHANGE[self.factor]
        return float(np.clip(alpha * self.per_alpha, -limit, limit))


def calibrate_exchange_rate(
    context: Context,
    editor: Editor,
    anatomy: Anatomy,
    direction: Direction,
    factor: str | None,
    count: int,
    batch_size: int,
    alpha: float,
) -> ExchangeRate | None:
    """The exchange rate between -alpha and +alpha on validation scans; None without phantoms or label maps.

    The rate is positive even if the direction shrinks the ventricles, so that the difference maps of such a direction
    are anticorrelated with the true ones. It is at least MIN_CHANGE / alpha.

    Args:
        count: at most this many scans.
    """
    renderer, rows = CounterfactualRenderer(context), context.sample_rows("val", count)
    if factor not in MAX_CHANGE or not renderer.available or "ventricle" not in anatomy.measures or not len(rows):
        return None
    alphas, slopes = [-alpha, 0.0, alpha], []
    for part in iterate_batches(rows, batch_size):
        scans = invert_scans(context, editor, anatomy, part)
        sweep = run_sweep(context, editor, anatomy, direction, scans, alphas)
        slopes.append(slope(np.array(alphas), sweep.volumes["ventricle"]))
    rate = float(np.nanmean(np.concatenate(slopes))) / renderer.ventricle_slope(rows, factor)
    if rate < 0:
        log.warning("this direction shrinks the ventricles of validation scans (%.3g %s per alpha)", rate, factor)
    return ExchangeRate(
        renderer, factor, max(abs(rate), MIN_CHANGE[factor] / alpha), expected_factor(context, direction, factor)
    )


def expected_factor(context: Context, direction: Direction, factor: str) -> float | None:
    """The severity, or years, that alpha = 1 is by its unit; None without a calibration.

    alpha counts distances between the classes, which differ in severity by as much as the training scans do on average.
    """
    calibration, amount = direction.calibration, direction.amount_per_alpha()
    if calibration is None or calibration.classes is None:
        return amount
    train = context.table.iloc[context.rows("train")]
    negative, positive = (train.loc[train[calibration.column] == name, factor].mean() for name in calibration.classes)
    return amount * float(positive - negative)


@dataclass(frozen=True)
class CounterfactualComparison:
    """B scans compared with their true counterfactuals at -alpha and +alpha.

    Attributes:
        metrics: (B,) each, see `compare_with_counterfactuals`.
        difference: true change at +alpha, (B, X, Y, Z).
    """

    metrics: dict[str, np.ndarray]
    difference: np.ndarray


@torch.no_grad()
def compare_with_counterfactuals(
    context: Context, anatomy: Anatomy, rate: ExchangeRate, sweep: AlphaSweep, alpha: float, ceiling: bool = True
) -> CounterfactualComparison:
    """Compare decoded with true changes at -alpha and +alpha.

    - `difference_r`: correlation of the difference maps inside the brain, mean of both ends; `difference_r_ceiling`:
      that of the true change as the autoencoder reconstructs it (only if `ceiling`).
    - `outside_share_true`: share of the true change that is outside the structures' regions.
    - `change_decoded`, `change_true`: growth of the ventricles from -alpha to +alpha, mm3.
    - `ventricle_error`: absolute difference of these two; `ventricle_error_unedited`: if nothing is changed.
    - `true_<structure>`: true change per unit of the factor, mm3; `seen_<structure>`: what the registration that
      measures the edits sees of it in the autoencoder's reconstructions of the counterfactuals (only if `ceiling`).
    """
    ends, rows, brain = (-alpha, alpha), sweep.scans.rows, sweep.brain
    span = rate.change(alpha) - rate.change(-alpha)
    rendered = {a: [rate.renderer.render(row, rate.factor, rate.change(a)) for row in rows] for a in (0.0, *ends)}
    volumes = {a: torch.stack([phantom.volume for phantom in phantoms]) for a, phantoms in rendered.items()}
    true = {end: to_arrays(volumes[end] - volumes[0.0]) for end in ends}
    found = {"difference_r": _correlations({end: sweep.difference_at(end) for end in ends}, true, brain)}
    if ceiling:
        passed = {a: context.model.decompress(context.model.compress(x)) for a, x in volumes.items()}
        best = {end: to_arrays(passed[end] - passed[0.0]) for end in ends}
        found["difference_r_ceiling"] = _correlations(best, true, brain)
        grown = [anatomy.grown_volumes(rows, passed[0.0], passed[end]) for end in ends]
        found |= {f"{SEEN}{name}": (grown[1][name] - grown[0][name]) / span for name in anatomy.registered}
    if anatomy.region is not None:
        found["outside_share_true"] = np.mean([share_outside(true[end], brain, anatomy.region) for end in ends], 0)
    for name in set(REGIONS) & set(rendered[alpha][0].volumes):
        mm3 = {end: np.array([phantom.volumes[name] for phantom in rendered[end]]) for end in ends}
        found[f"{TRUE}{name}"] = (mm3[alpha] - mm3[-alpha]) / span
    found["change_true"] = found[f"{TRUE}ventricle"] * span
    found["change_decoded"] = sweep.volume_change("ventricle", alpha) - sweep.volume_change("ventricle", -alpha)
    found["ventricle_error"] = np.abs(found["change_decoded"] - found["change_true"])
    found["ventricle_error_unedited"] = np.abs(found["change_true"])
    return CounterfactualComparison(found, true[alpha])


def _correlations(
    first: Mapping[float, np.ndarray], second: Mapping[float, np.ndarray], brain: np.ndarray
) -> np.ndarray:
    """Correlation (B,) of difference maps (B, X, Y, Z), averaged over the ends."""
    values = [
        [correlation(a, b, mask) for a, b, mask in zip(first[end], second[end], brain, strict=True)] for end in first
    ]
    return np.mean(values, axis=0)
