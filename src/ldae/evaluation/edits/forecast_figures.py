"""Figures of forecasts: slices with the map of the standard deviation, and errors by the years ahead."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ldae.evaluation.figures import draw_curves, open_figure, show_slice
from ldae.utils.slices import PLANES, slices_to_show

LABELS = {
    "ldae": "LDAE forecast",
    "last": "last visit unchanged",
    "mean_change": "mean change of the population",
    "latent": "learned change of latents",
    "extrapolated": "latents extrapolated (two visits)",
    "interpolated": "blend with a later visit (knows the future)",
}
AXES = {
    "ssim_mask": "SSIM in the brain",
    "mse_mask": "mean squared error in the brain",
    "ventricle_error": "error of the ventricle volume, mm3",
    "hippocampus_error": "error of the hippocampus volume, mm3",
}


def draw_forecast(
    path: Path,
    volumes: Mapping[str, np.ndarray],
    changes: Mapping[str, np.ndarray],
    deviation: np.ndarray,
    cut: tuple[int, int, int],
    title: str,
) -> None:
    """Labelled volumes in grey, differences in colour with one scale (red = brighter), and the standard deviation.

    Args:
        volumes, changes, deviation: (X, Y, Z) in RAS.
        cut: the voxel through which the slices go.
    """
    limit = max(float(np.percentile(np.abs(list(changes.values())), 99.5)), 1e-3)
    top = max(float(np.percentile(deviation, 99.8)), 1e-3)
    grey, signed = {"vmin": 0, "vmax": 1, "cmap": "gray"}, {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r"}
    columns = [
        *((name, volume, "w", grey) for name, volume in volumes.items()),
        *((name, volume, "k", signed) for name, volume in changes.items()),
        ("standard deviation", deviation, "w", {"vmin": 0, "vmax": top, "cmap": "magma"}),
    ]
    with open_figure(path, (1.75 * len(columns) + 1.6, 5.4), 3, len(columns)) as (figure, grid):
        drawn = {}
        for column, (name, volume, colour, options) in enumerate(columns):
            for axes, (plane, image) in zip(grid[:, column], slices_to_show(volume, cut).items(), strict=True):
                drawn[name] = show_slice(axes, image, plane, colour, **options)
            grid[0, column].set_title(name, fontsize=8)
        for axes, plane in zip(grid[:, 0], PLANES, strict=True):
            axes.set_ylabel(plane, fontsize=8)
        last_change = list(changes)[-1]
        place = len(columns) - 2
        figure.colorbar(drawn[last_change], ax=grid[:, place], shrink=0.6, label="difference, of the intensity range")
        figure.colorbar(drawn["standard deviation"], ax=grid[:, -1], shrink=0.6, label="of the forecast's change")
        figure.suptitle(title, fontsize=9)


def draw_forecast_curves(out: Path, table: pd.DataFrame) -> None:
    """Metrics of forecast.csv by the years between visits, against the truth if there is one, a curve per method."""
    best = "truth" if (table["against"] == "truth").any() else "real"
    for metric, words in AXES.items():
        part = table[table["against"] == ("real" if metric == "hippocampus_error" else best)]
        part = part[part["method"].isin(list(LABELS))]
        if metric not in part or not part[metric].notna().any():
            continue
        means = {name: rows.groupby("gap")[metric].mean().dropna() for name, rows in part.groupby("method", sort=False)}
        curves = {
            LABELS[name]: ((values.index / 12).tolist(), values.tolist())
            for name, values in means.items()
            if len(values)
        }
        draw_curves(out / f"forecast_{metric}.png", curves, "years between visits", words)
