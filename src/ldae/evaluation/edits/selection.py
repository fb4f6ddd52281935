"""Which direction estimator and which editor settings change scans most like the true counterfactual?

On VALIDATION subjects of a phantom cohort. First every direction estimator is tried with the default editor, then the
best `finalists` of them with every editor. Settings are compared by the correlation of decoded with true difference
maps. The best setting has the highest median correlation among those whose ventricles grow monotonically, from -alpha
to 0 and from 0 to +alpha, in at least 80 % of the scans, or among all if there is none.

Metrics for every probe:

- `selection/<probe>/best_{difference_r,monotone,identity,effect_percent}`: of the best setting: the median correlation
  of the difference maps; the share of scans whose ventricles grow monotonically; SSIM in the brain to alpha = 0; the
  growth of the ventricles from -alpha to +alpha in percent.
- `selection/<probe>/best_{depth,renoise,strength,alpha}`: that setting.
- `selection/<probe>/<estimator>/difference_r`: the highest correlation of each estimator.

selection_<probe>.csv lists all settings, the best first; selection_<probe>.png shows identity against effect.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd

from ldae.editing.direction import Direction
from ldae.editing.directions import TRAINING_DISTANCE, DirectionEstimator, find_direction
from ldae.editing.editor import Editor
from ldae.editing.units import AlphaUnit
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.edits.alpha_sweep import run_sweep
from ldae.evaluation.edits.anatomy import Anatomy
from ldae.evaluation.edits.counterfactuals import (
    FACTORS,
    MAX_CHANGE,
    CachedCounterfactuals,
    CounterfactualRenderer,
    ExchangeRate,
    compare_with_counterfactuals,
)
from ldae.evaluation.edits.figures import draw_trade_off
from ldae.evaluation.edits.inverted_scans import InvertedScans, invert_scans
from ldae.evaluation.images.image_metrics import ssim
from ldae.evaluation.probes.targets import Probe
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

MONOTONE = 0.8
TRUE_CHANGE = {"severity": 0.6, "age": 10.0}  # of the counterfactuals at any alpha: correlations do not depend on scale
MAX_CURVES = 16


class Selection:
    """The evaluation that the module describes.

    Args:
        estimators: direction estimators by name.
        editor: the editor of the first round.
        depths, renoises, strengths: every combination is an editor of the second round.
        alphas: positive values; every setting is tried at each of them.
        scans: at most this many validation scans.
        finalists: how many estimators take part in the second round.
        unit: of alpha.
    """

    def __init__(
        self,
        probes: Mapping[str, Probe],
        estimators: Mapping[str, DirectionEstimator],
        editor: Editor,
        depths: Sequence[float] = (1.0, 0.8, 0.6, 0.5),
        renoises: Sequence[float] = (0.0, 0.3),
        strengths: Sequence[float | None] = (1.0, 1.5),
        alphas: Sequence[float] = (0.5, 1.0),
        scans: int = 12,
        finalists: int = 2,
        batch_size: int = 12,
        unit: AlphaUnit = TRAINING_DISTANCE,
    ):
        self.probes, self.estimators, self.editor = dict(probes or {}), dict(estimators), editor
        self.editors = [
            Editor(editor.steps, depth, renoise, strength)
            for depth, renoise, strength in product(depths, renoises, strengths)
        ]
        self.alphas, self.scans, self.finalists, self.batch_size = list(alphas), scans, finalists, batch_size
        self.unit = unit

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        renderer, anatomy = CounterfactualRenderer(context), Anatomy(context)
        rows = context.sample_rows("val", self.scans)
        if not renderer.available or "ventricle" not in anatomy.measures or not len(rows):
            context.skip("selection is skipped: it needs phantoms with label maps among the validation subjects")
            return
        for name, probe in self.probes.items():
            factor = FACTORS.get(probe.column)
            if factor not in MAX_CHANGE:
                context.skip(f"selection for {name} is skipped: phantoms have no counterfactual of it")
                continue
            directions = self._find_directions(context, probe)
            if directions:
                yield from self._compare(context, anatomy, name, directions, renderer, factor, rows)

    def _find_directions(self, context: Context, probe: Probe) -> dict[str, Direction]:
        found, train = {}, context.rows("train")
        for key, estimator in self.estimators.items():
            try:
                found[key] = find_direction(
                    estimator, probe, context.table, context.embeddings, train, context.seed, self.unit
                )
            except UserError as error:
                log.warning("direction estimator %s is skipped: %s", key, error)
        return found

    def _compare(
        self,
        context: Context,
        anatomy: Anatomy,
        name: str,
        directions: Mapping[str, Direction],
        renderer: CounterfactualRenderer,
        factor: str,
        rows: np.ndarray,
    ) -> Iterator[tuple[str, float]]:
        """Both rounds for one probe."""
        table = self._try_settings(context, anatomy, directions, [self.editor], renderer, factor, rows)
        best = rank_settings(table)["estimator"].drop_duplicates().head(self.finalists)
        finalists = {key: directions[key] for key in best}
        second = self._try_settings(context, anatomy, finalists, self.editors, renderer, factor, rows)
        table = rank_settings(pd.concat([table, second]))
        context.write_csv(f"selection_{name}.csv", table)
        title = f"{name}: identity against effect, {len(rows)} validation scans"
        draw_trade_off(context.out / f"selection_{name}.png", trade_off_curves(table), title)
        log.info("best settings for edits along %s:\n%s", name, table.head(8).to_string(index=False))
        winner = table.iloc[0]
        for key in ("difference_r", "monotone", "identity", "effect_percent", "depth", "renoise", "strength", "alpha"):
            if pd.notna(winner[key]):  # a strength of None is the sampler's own
                yield f"selection/{name}/best_{key}", float(winner[key])
        for estimator, part in table.groupby("estimator", sort=False):
            yield f"selection/{name}/{estimator}/difference_r", float(part["difference_r"].max())

    def _try_settings(
        self,
        context: Context,
        anatomy: Anatomy,
        directions: Mapping[str, Direction],
        editors: Sequence[Editor],
        renderer: CounterfactualRenderer,
        factor: str,
        rows: np.ndarray,
    ) -> pd.DataFrame:
        """One row per direction, editor and alpha; scans are inverted once per editor."""
        from tqdm import tqdm

        found: dict[tuple[str, Editor, float], list[dict[str, np.ndarray]]] = {}
        cached = CachedCounterfactuals(renderer)
        for editor in tqdm(editors, "settings"):
            for part in iterate_batches(rows, self.batch_size):
                scans = invert_scans(context, editor, anatomy, part)
                for (key, direction), alpha in product(directions.items(), self.alphas):
                    rate = ExchangeRate(cached, factor, TRUE_CHANGE[factor] / alpha)
                    metrics = _measure(context, anatomy, editor, direction, scans, alpha, rate)
                    found.setdefault((key, editor, alpha), []).append(metrics)
        settings = []
        for (key, editor, alpha), parts in found.items():
            metrics = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            settings.append({"estimator": key, **vars(editor), "alpha": alpha, **_summarise(metrics)})
        return pd.DataFrame(settings)


def _measure(
    context: Context,
    anatomy: Anatomy,
    editor: Editor,
    direction: Direction,
    scans: InvertedScans,
    alpha: float,
    rate: ExchangeRate,
) -> dict[str, np.ndarray]:
    """Metrics of one setting on one batch, (B,) each."""
    sweep = run_sweep(context, editor, anatomy, direction, scans, [-alpha, 0.0, alpha])
    comparison = compare_with_counterfactuals(context, anatomy, rate, sweep, alpha, ceiling=False)
    volumes = sweep.volumes["ventricle"]
    reconstruction = ssim(sweep.images_at(0.0), scans.reconstruction, scans.mask)
    return {
        "difference_r": comparison.metrics["difference_r"],
        "monotone": ((np.diff(volumes, axis=1) > 0).all(1)).astype(float),
        "identity": sweep.identity[:, [0, 2]].mean(1),
        "effect_percent": 100 * (volumes[:, 2] - volumes[:, 0]) / volumes[:, 1],
        "reconstruction": reconstruction.double().cpu().numpy(),
    }


def _summarise(metrics: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Medians over scans; for `monotone` the share."""
    medians = {name: float(np.nanmedian(values)) for name, values in metrics.items() if name != "monotone"}
    return medians | {"monotone": float(metrics["monotone"].mean())}


def rank_settings(table: pd.DataFrame) -> pd.DataFrame:
    """The settings, the best first; see the module's docstring."""
    monotone = table["monotone"] >= MONOTONE
    ranked = table.assign(is_monotone=monotone).sort_values(["is_monotone", "difference_r"], ascending=False)
    return ranked.drop(columns="is_monotone")


def trade_off_curves(table: pd.DataFrame) -> dict[str, tuple[list[float], list[float]]]:
    """Effect and identity over alpha of the best settings, by label."""
    curves = {}
    settings = ["estimator", "depth", "renoise", "strength"]
    for (estimator, depth, renoise, strength), part in table.groupby(settings, sort=False, dropna=False):
        part = part.sort_values("alpha")
        guidance = f", guidance x{strength:g}" if pd.notna(strength) else ""
        label = f"{estimator}, depth {depth:g}, renoise {renoise:g}{guidance}: r {part['difference_r'].max():.2f}"
        curves[label] = part["effect_percent"].tolist(), part["identity"].tolist()
        if len(curves) == MAX_CURVES:
            break
    return curves
