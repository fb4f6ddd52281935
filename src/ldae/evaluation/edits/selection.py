"""Which direction, depth, renoising and guidance edit best? Judged on VALIDATION phantoms by true counterfactuals.

First every estimator with the default editor, then the best `finalists` of them with every editor. Each is judged by
the correlation of decoded with true difference maps, by how surely the ventricles follow (`monotone`: they grow from
-alpha to 0 and from 0 to +alpha), and by identity. The winner has the highest median correlation of maps among those
that are monotone in at least 80 % of the scans, or of all where none is.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from ldae.data.subsampling import subsample_by_subject
from ldae.editing.directions import Direction, DirectionEstimator, find_direction
from ldae.editing.editor import Editor
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.edits import figures as edit_figures
from ldae.evaluation.edits.alpha_sweep import run_sweep
from ldae.evaluation.edits.anatomy import Anatomy
from ldae.evaluation.edits.counterfactuals import (
    FACTORS,
    LIMITS,
    CounterfactualRenderer,
    ExchangeRate,
    compare_with_counterfactuals,
)
from ldae.evaluation.edits.inverted_scans import InvertedScans, invert_scans
from ldae.utils.errors import UserError
from ldae.utils.files import replacing

log = logging.getLogger(__name__)

MONOTONE = 0.8
REFERENCE = {"severity": 0.6, "age": 10.0}  # true change that maps are compared with: correlation has no scale


class Selection:
    """`selection/<probe>/...` and `selection_<probe>.csv`, sorted by rank; figure of identity against effect.

    Args:
        probes: name to probe.
        estimators: name to direction estimator.
        depths, renoises, strengths: every combination is an editor.
        editor: the one of the first round.
        alphas: positive; every setting is tried at each.
        finalists: estimators that go to the second round.
    """

    def __init__(
        self,
        probes: Mapping[str, Any],
        estimators: Mapping[str, DirectionEstimator],
        editor: Editor,
        depths: Sequence[float] = (1.0, 0.8, 0.6, 0.5),
        renoises: Sequence[float] = (0.0, 0.3),
        strengths: Sequence[float] = (1.0, 1.5),
        alphas: Sequence[float] = (0.5, 1.0),
        scans: int = 12,
        finalists: int = 2,
        batch_size: int = 12,
    ):
        self.probes, self.estimators, self.editor = dict(probes or {}), dict(estimators), editor
        self.grid = [
            Editor(editor.steps, depth, renoise, strength)
            for depth, renoise, strength in product(depths, renoises, strengths)
        ]
        self.alphas, self.scans, self.finalists, self.batch_size = list(alphas), scans, finalists, batch_size

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        source, anatomy = CounterfactualRenderer(context), Anatomy(context)
        rows = subsample_by_subject(context.rows("val"), context.table["subject"].tolist(), self.scans, context.seed)
        if not source.available or "ventricle" not in anatomy.measures or not len(rows):
            log.warning("selection is skipped: it needs phantoms with label maps among the validation subjects")
            return
        for name, probe in self.probes.items():
            factor = FACTORS.get(probe.column)
            if factor not in LIMITS:
                log.warning("selection for %s is skipped: phantoms have no counterfactual of it", name)
                continue
            yield from self._one(context, anatomy, name, probe, ExchangeRate(source, factor, REFERENCE[factor]), rows)

    def _one(
        self, context: Context, anatomy: Anatomy, name: str, probe: Any, rate: ExchangeRate, rows: np.ndarray
    ) -> Iterator[tuple[str, float]]:
        directions = self._directions(context, probe)
        if not directions:
            return
        table = self._try(context, anatomy, directions, [self.editor], rate, rows)
        best = rank_settings(table)["estimator"].drop_duplicates().head(self.finalists)
        finals = {key: directions[key] for key in best}
        table = rank_settings(pd.concat([table, self._try(context, anatomy, finals, self.grid, rate, rows)]))
        with replacing(context.out / f"selection_{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
        title = f"{name}: identity against effect, {len(rows)} validation scans"
        edit_figures.draw_trade_off(context.out / f"selection_{name}.png", trade_off_curves(table), title)
        winner = table.iloc[0]
        log.info("best settings for edits along %s:\n%s", name, table.head(8).to_string(index=False))
        for key in ("difference_r", "monotone", "identity", "effect_percent", "depth", "renoise", "strength", "alpha"):
            if pd.notna(winner[key]):  # no strength: the sampler's own
                yield f"selection/{name}/best_{key}", float(winner[key])
        for estimator, part in table.groupby("estimator", sort=False):
            yield f"selection/{name}/{estimator}/difference_r", float(part["difference_r"].max())

    def _directions(self, context: Context, probe: Any) -> dict[str, Direction]:
        found, train = {}, context.rows("train")
        for key, estimator in self.estimators.items():
            try:
                found[key] = find_direction(estimator, probe, context.table, context.embeddings, train, context.seed)
            except UserError as error:
                log.warning("estimator %s is left out: %s", key, error)
        return found

    def _try(
        self,
        context: Context,
        anatomy: Anatomy,
        directions: Mapping[str, Direction],
        editors: Sequence[Editor],
        rate: ExchangeRate,
        rows: np.ndarray,
    ) -> pd.DataFrame:
        """A row for every direction, editor and alpha. Inversion is done once an editor, truths are rendered once."""
        from tqdm import tqdm

        found: dict[tuple[str, Editor, float], list[dict[str, np.ndarray]]] = {}
        remembered = CachedCounterfactuals(rate.source)
        for editor in tqdm(editors, "settings"):
            for part in iterate_batches(rows, self.batch_size):
                opened = invert_scans(context, editor, anatomy, part)
                for (key, direction), alpha in product(directions.items(), self.alphas):
                    trial = ExchangeRate(remembered, rate.factor, rate.per_alpha / alpha)
                    numbers = _trial(context, anatomy, editor, direction, opened, alpha, trial)
                    found.setdefault((key, editor, alpha), []).append(numbers)
        rows_out = []
        for (key, editor, alpha), parts in found.items():
            joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            rows_out.append({"estimator": key, **vars(editor), "alpha": alpha, **_aggregate(joined)})
        return pd.DataFrame(rows_out)


class CachedCounterfactuals:
    """Counterfactuals rendered once."""

    def __init__(self, source: CounterfactualRenderer):
        self.source, self.rendered = source, {}

    def render(self, row: int, factor: str = "severity", change: float = 0.0) -> Any:
        """See Counterfactuals."""
        key = (row, factor, round(change, 6))
        if key not in self.rendered:
            self.rendered[key] = self.source.render(row, factor, change)
        return self.rendered[key]


def _trial(
    context: Context, anatomy: Anatomy, editor: Editor, direction: Direction, opened: InvertedScans, alpha: float,
    rate: ExchangeRate,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Numbers of one setting on one batch, (B,) each."""
    ladder = run_sweep(context, editor, anatomy, direction, opened, [-alpha, 0.0, alpha])
    volumes = ladder.volumes["ventricle"]
    return {
        "difference_r": compare_with_counterfactuals(context, anatomy, rate, ladder, alpha, ceiling=False).numbers[
            "difference_r"
        ],
        "monotone": ((np.diff(volumes, axis=1) > 0).all(1)).astype(float),
        "identity": ladder.identity[:, [0, 2]].mean(1),
        "effect_percent": 100 * (volumes[:, 2] - volumes[:, 0]) / volumes[:, 1],
        "reconstruction": _brain_ssim(ladder.at(0.0), opened),
    }


def _brain_ssim(image: Any, opened: InvertedScans) -> np.ndarray:
    from ldae.evaluation.images.image_metrics import ssim

    return ssim(image, opened.reconstruction, opened.mask).double().cpu().numpy()


def _aggregate(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    medians = {name: float(np.nanmedian(values[name])) for name in values if name != "monotone"}
    return medians | {"monotone": float(values["monotone"].mean())}


def rank_settings(table: pd.DataFrame) -> pd.DataFrame:
    """Best first; see the module's docstring."""
    sure = table["monotone"] >= MONOTONE
    return table.assign(sure=sure).sort_values(["sure", "difference_r"], ascending=False).drop(columns="sure")


def trade_off_curves(table: pd.DataFrame) -> dict[str, tuple[list[float], list[float]]]:
    """Effect and identity over alpha of each setting, for the figure: the best sixteen."""
    found = {}
    for (estimator, depth, renoise, strength), part in table.groupby(
        ["estimator", "depth", "renoise", "strength"], sort=False, dropna=False
    ):
        part = part.sort_values("alpha")
        times = f", x{strength:g}" if pd.notna(strength) else ""
        label = f"{estimator}, depth {depth:g}, renoise {renoise:g}{times}"
        found[f"{label}: r {part['difference_r'].max():.2f}"] = (
            part["effect_percent"].tolist(),
            part["identity"].tolist(),
        )
        if len(found) == 16:
            break
    return found
