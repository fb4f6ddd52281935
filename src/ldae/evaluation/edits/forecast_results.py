"""Summaries of forecasts: metrics by method, gains over the last visit by gap, and the intervals of volumes."""

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from ldae.editing.forecaster import Forecaster
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.edits.anatomy import REGIONS
from ldae.evaluation.edits.forecast_predictions import Visits
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise_mean

log = logging.getLogger(__name__)

OURS, LAST = "ldae", "last"
BATCH = 16  # label maps that are read at once
SIGNS = {"mse": -1, "mse_mask": -1, "ssim": 1, "ssim_mask": 1, "ventricle_error": -1, "hippocampus_error": -1}
BY_GAP = ("mse_mask", "ssim_mask", "ventricle_error", "hippocampus_error")
PER_GAP_OVER = ("last", "mean_change", "latent")  # baselines that gains are also given for by gap
WORDS = {1: "better than", 0: "as good as", -1: "worse than"}


def round_gap(years: float) -> int:
    """Months between visits to the nearest half-year up to 18 months, then to the nearest year."""
    months = 12 * years
    step = 6 if months < 21 else 12
    return max(int(step * np.floor(months / step + 0.5)), 6)


def summarise_forecasts(table: pd.DataFrame, resamples: int, seed: int) -> Iterator[tuple[str, float]]:
    """Metrics of the rows of forecast.csv: means, gains over each baseline on the same pairs, and both by gap."""
    for against, part in table.groupby("against", sort=False):
        for metric in (name for name in SIGNS if name in part and part[name].notna().any()):
            wide = part.pivot(index=["subject", "row", "target", "gap"], columns="method", values=metric).reset_index()
            yield from _summarise_metric(wide, str(against), metric, resamples, seed)


def _summarise_metric(
    wide: pd.DataFrame, against: str, metric: str, resamples: int, seed: int
) -> Iterator[tuple[str, float]]:
    """One metric against one target; `wide` has a column per method."""
    methods = [name for name in wide.columns if name not in ("subject", "row", "target", "gap")]
    for method in methods:
        known = wide[wide[method].notna()]
        if len(known):
            weights = draw_subject_weights(known["subject"], resamples, seed)
            yield from summarise_mean(f"forecast/{method}/{against}/{metric}", known[method].to_numpy(), weights)
        for gap, values in known.groupby("gap")[method] if metric in BY_GAP else ():
            yield f"forecast/{method}/{against}/{metric}_gap{gap:02d}", float(values.mean())
    for method in (name for name in methods if name != OURS):
        stem = f"forecast/gain/{against}/{metric}_over_{method}"
        both = wide[wide[method].notna() & wide[OURS].notna()]
        yield from _gain(both, method, metric, stem, resamples, seed)
        if method not in PER_GAP_OVER or metric not in BY_GAP:
            continue
        for gap, rows in both.groupby("gap"):
            found = list(_gain(rows, method, metric, f"{stem}_gap{gap:02d}", resamples, seed))
            yield from found
            if method == LAST and found:
                yield f"forecast/verdict/{against}/{metric}_gap{gap:02d}", _verdict(found, against, metric, int(gap))


def _gain(
    rows: pd.DataFrame, method: str, metric: str, stem: str, resamples: int, seed: int
) -> Iterator[tuple[str, float]]:
    if len(rows):
        gain = SIGNS[metric] * (rows[OURS] - rows[method]).to_numpy()
        yield from summarise_mean(stem, gain, draw_subject_weights(rows["subject"], resamples, seed))


def _verdict(found: Sequence[tuple[str, float]], against: str, metric: str, gap: int) -> float:
    """1, 0 or -1 by the interval of a gain; it is logged in words."""
    low, high = found[1][1], found[2][1]
    verdict = 1 if low > 0 else -1 if high < 0 else 0
    log.info("forecast of %d months: %s the last visit in %s (%s)", gap, WORDS[verdict], metric, against)
    return float(verdict)


def measure_intervals(context: Context, forecaster: Forecaster, test: Sequence[Visits]) -> pd.DataFrame:
    """One row per pair of visits and structure whose volumes are known: true ratio, its forecast and its interval."""
    first = [visits.row for visits in test for _ in visits.targets]
    second = [target for visits in test for target in visits.targets]
    years = np.concatenate([visits.years for visits in test])
    rows = context.table.iloc[first].reset_index(drop=True)
    features = forecaster.features(context.embeddings[first], rows)
    parts = []
    for name, one in forecaster.volumes.items():
        ratio = one.ratio(features, years)
        volumes = known_volumes(context, name, np.unique([*first, *second]))
        true = volumes[second] / volumes[first]
        parts.append(
            pd.DataFrame({
                "structure": name, "subject": rows["subject"], "session": rows["session"], "years": years,
                "gap": [round_gap(time) for time in years], "ratio": ratio[:, 0], "low": ratio[:, 1],
                "high": ratio[:, 2], "true": true,
            })
        )  # fmt: skip
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"true": []})
    return found[found["true"].notna()]


def known_volumes(context: Context, name: str, rows: np.ndarray) -> np.ndarray:
    """Volume of a structure in the scans of `rows`, mm3, (N,); NaN in all others and where it is not known.

    From the column `<name>_mm3` of the table, or from the label maps if the table has no such column.
    """
    found, column = np.full(len(context.table), np.nan), f"{name}_mm3"
    if column in context.table:
        found[rows] = pd.to_numeric(context.table[column].iloc[rows], errors="coerce")
    elif context.regions is not None:
        voxel = float(np.prod(context.spacing))
        for part in iterate_batches(rows, BATCH):
            found[part] = context.regions(part, REGIONS[name]).sum((1, 2, 3)) * voxel
    found[~(found > 0)] = np.nan
    return found


def summarise_intervals(table: pd.DataFrame, resamples: int, seed: int) -> Iterator[tuple[str, float]]:
    """Coverage, width and errors of the rows of forecast_volumes.csv, over all pairs and by gap."""
    for name, part in table.groupby("structure", sort=False):
        values = pd.DataFrame({
            "coverage": (part["low"] <= part["true"]) & (part["true"] <= part["high"]),
            "width_percent": 100 * (part["high"] - part["low"]),
            "error_percent": 100 * (part["ratio"] - part["true"]).abs(),
            "unchanged_percent": 100 * (1 - part["true"]).abs(),
        }).astype(float)  # fmt: skip
        weights = draw_subject_weights(part["subject"], resamples, seed)
        for metric in values:
            yield from summarise_mean(f"forecast/interval/{name}/{metric}", values[metric].to_numpy(), weights)
            for gap, rows in values.groupby(part["gap"])[metric]:
                yield f"forecast/interval/{name}/{metric}_gap{gap:02d}", float(rows.mean())
