"""From which slices was y computed? How the semantic encoder weights the slices of the test scans.

Attention shows which slices contribute to y, not what in them matters, nor what information y contains.

Metrics, with intervals over subjects:

- `attention/entropy_share`: entropy of a scan's weights over that of equal weights; 1 = all slices weigh the same.
- `attention/peak_mm`: position of the slice with the largest weight, in mm from the middle of the volume.
- `attention/own_share`: share of the weights' squared deviation from equal weights that differs between scans.
- `attention/scans`: how many test scans there were.

attention.csv contains the weights of every scan, attention.png shows them beside the mean scan.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ldae.evaluation import figures
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AXIS_LABELS = ("left to right, mm", "back to front, mm", "bottom to top, mm")


class Attention:
    """The evaluation that the module describes."""

    def __init__(self, scans: int | None = None, batch_size: int = 8, resamples: int = 1000) -> None:
        """`scans`: at most this many test scans; None: all of them."""
        self.scans, self.batch_size, self.resamples = scans, batch_size, resamples

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        rows = context.sample_rows("test", self.scans)
        if not len(rows):
            return
        if not hasattr(context.model.encoder, "axis"):
            context.skip("attention is skipped: this encoder does not weigh slices")
            return
        attention, mean_scan = self._collect(context, rows)
        slices, axis = attention.shape[1], int(context.model.encoder.axis)
        positions = (np.arange(slices) - (slices - 1) / 2) * _view_spacing(context)[axis]
        weights = draw_subject_weights(context.subjects(rows), self.resamples, context.seed)
        yield "attention/scans", float(len(rows))
        entropy = -(attention * np.log(np.maximum(attention, 1e-12))).sum(1) / np.log(slices)
        yield from summarise_mean("attention/entropy_share", entropy, weights)
        yield from summarise_mean("attention/peak_mm", positions[attention.argmax(1)], weights)
        deviation = ((attention - 1 / slices) ** 2).sum()
        if deviation > 0:
            yield "attention/own_share", float(((attention - attention.mean(0)) ** 2).sum() / deviation)
        columns = [f"slice{number:03d}" for number in range(slices)]
        scans = context.table.iloc[rows][["subject", "session"]].reset_index(drop=True)
        context.write_csv("attention.csv", pd.concat([scans, pd.DataFrame(attention, columns=columns)], axis=1))
        _draw(context, attention, positions, mean_scan, axis)

    def _collect(self, context: Context, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Attention weights (N, slices), and the mean of the scans (X, Y, Z)."""
        parts, total = [], 0.0
        for part in iterate_batches(rows, self.batch_size):
            x = context.volumes(part)
            parts.append(context.model.attention_of_views(context.views(part)).cpu().numpy().astype(np.float64))
            total = total + x[:, 0].numpy().sum(0)
        return np.concatenate(parts), total / len(rows)


def _view_spacing(context: Context) -> tuple[float, float, float]:
    """Voxel size of what the encoder sees, mm."""
    view = context.model.view
    return context.spacing if view is None or view.spacing is None else view.spacing


def _draw(context: Context, attention: np.ndarray, positions: np.ndarray, mean_scan: np.ndarray, axis: int) -> None:
    """Attention by position, a thin line per scan, beside the mean scan."""
    with figures.open_figure(context.out / "attention.png", (8.5, 4.4), 1, 2) as (_, (scan, curve)):
        _show_mean_scan(scan, mean_scan, axis, attention.mean(0), context.spacing, positions)
        curve.plot(100 * attention.T, positions, color="0.6", alpha=0.4, linewidth=0.7)
        curve.plot(100 * attention.mean(0), positions, "k", linewidth=2, label="mean of all scans")
        equal = 100 / attention.shape[1]
        curve.axvline(equal, color="tab:blue", linestyle="--", linewidth=1, label="equal weights")
        curve.set(xlabel="attention weight of a slice, %", ylabel=AXIS_LABELS[axis], ylim=scan.get_ylim())
        curve.set_title(f"{len(attention)} test scans")
        curve.legend(fontsize=8)


def _show_mean_scan(
    axes: "Axes",
    mean_scan: np.ndarray,
    axis: int,
    attention: np.ndarray,
    spacing: tuple[float, float, float],
    positions: np.ndarray,
) -> None:
    """A middle slice of the mean scan with the encoder's slice axis upwards, tinted red where attention is high."""
    horizontal = 0 if axis == 1 else 1
    across = 3 - axis - horizontal
    middle = mean_scan.take(mean_scan.shape[across] // 2, across)
    plane = np.moveaxis(middle, 0 if axis < horizontal else 1, 0)
    width, height = (mean_scan.shape[across] * spacing[across] / 2 for across in (horizontal, axis))
    extent = (-width, width, -height, height)
    axes.imshow(plane, cmap="gray", origin="lower", extent=extent, interpolation="nearest")
    tint = np.zeros((len(attention), 1, 4))
    tint[..., 0] = 1
    tint[:, 0, 3] = 0.6 * np.clip(attention * len(attention) - 1, 0, 1)  # full red at twice an equal weight
    step = (positions[1] - positions[0]) / 2
    extent = (-width, width, positions[0] - step, positions[-1] + step)
    axes.imshow(tint, origin="lower", extent=extent, aspect="equal", interpolation="nearest")
    axes.set_ylim(-height, height)
    axes.set(xlabel=AXIS_LABELS[horizontal], ylabel=AXIS_LABELS[axis], title="mean scan; red: above equal weight")
