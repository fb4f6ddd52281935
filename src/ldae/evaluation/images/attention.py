"""Where the encoder looked: how much the query attends to each slice of the test scans.

It says which slices y was read from, not what in them mattered, nor that y holds it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ldae.data.subsampling import subsample_by_subject
from ldae.evaluation import figures
from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.probes.bootstrap import draw_subject_weights, summarise

AXES = ("x, mm to the right", "y, mm to the front", "z, mm upwards")


class Attention:
    """`attention/...` on test scans, with intervals over subjects; attention.csv and attention.png.

    - `entropy_share`: entropy of a scan's weights over that of equal weights, 1 = every slice alike;
    - `peak_mm`: place of the slice that is looked at most, from the middle of the volume;
    - `own_share`: part of the weights' deviation from equal weights that is the scan's own and not of all scans.
    """

    def __init__(self, scans: int | None = None, batch_size: int = 8, resamples: int = 1000) -> None:
        """`scans` at most (None: all of test)."""
        self.scans, self.batch_size, self.resamples = scans, batch_size, resamples

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        subjects = context.table["subject"].to_numpy(str)
        rows = subsample_by_subject(context.rows("test"), subjects.tolist(), self.scans, context.seed)
        if not len(rows):
            return
        model, parts, total = context.model, [], 0.0
        for part in iterate_batches(rows, self.batch_size):
            x = context.volumes(part)
            parts.append(model.attention(x).cpu().numpy().astype(np.float64))
            total = total + x[:, 0].numpy().sum(0)
        looks, axis = np.concatenate(parts), int(model.encoder.axis)
        places = (np.arange(looks.shape[1]) - (looks.shape[1] - 1) / 2) * context.spacing[axis]
        weights = draw_subject_weights(subjects[rows], self.resamples, context.seed)
        yield "attention/scans", float(len(rows))
        found = {
            "entropy_share": -(looks * np.log(np.maximum(looks, 1e-12))).sum(1) / np.log(looks.shape[1]),
            "peak_mm": places[looks.argmax(1)],
        }
        for name, values in found.items():
            yield from summarise(f"attention/{name}", weights @ values / weights.sum(1))
        away = ((looks - 1 / looks.shape[1]) ** 2).sum()
        if away > 0:
            yield "attention/own_share", float(((looks - looks.mean(0)) ** 2).sum() / away)
        _write(context, rows, looks, places, total / len(rows), axis)


def _write(
    context: Context, rows: np.ndarray, looks: np.ndarray, places: np.ndarray, mean: np.ndarray, axis: int
) -> None:
    """The weights of every scan, and their curve beside the mean scan."""
    import pandas as pd

    from ldae.utils.files import replacing

    columns = [f"slice{number:03d}" for number in range(looks.shape[1])]
    who = context.table.iloc[rows][["subject", "session"]].reset_index(drop=True)
    with replacing(context.out / "attention.csv") as temporary:
        pd.concat([who, pd.DataFrame(looks, columns=columns)], axis=1).to_csv(temporary, index=False)
    with figures.open_figure(context.out / "attention.png", (8.5, 4.4), 1, 2) as (_, (scan, curve)):
        _show_mean(scan, mean, axis, looks.mean(0), context.spacing, places)
        curve.plot(100 * looks.T, places, color="0.6", alpha=0.4, linewidth=0.7)
        curve.plot(100 * looks.mean(0), places, "k", linewidth=2, label="mean")
        curve.axvline(100 / looks.shape[1], color="tab:blue", linestyle="--", linewidth=1, label="every slice alike")
        curve.set(xlabel="attention, %", ylabel=AXES[axis], title=f"{len(looks)} test scans", ylim=scan.get_ylim())
        curve.legend(fontsize=8)


def _show_mean(
    axes: Any, mean: np.ndarray, axis: int, looks: np.ndarray, spacing: tuple[float, float, float], places: np.ndarray
) -> None:
    """A middle slice of the mean scan with the slices' axis upwards, tinted by attention."""
    other = 0 if axis == 1 else 1  # y beside x and z, x beside y
    across = 3 - axis - other
    plane = np.moveaxis(mean.take(mean.shape[across] // 2, across), 0 if axis < other else 1, 0)
    width, step = mean.shape[other] * spacing[other] / 2, spacing[axis] / 2
    extent = (-width, width, places[0] - step, places[-1] + step)
    axes.imshow(plane, cmap="gray", origin="lower", extent=extent, interpolation="nearest")
    tint = np.zeros((len(looks), 1, 4))
    tint[..., 0] = 1
    tint[:, 0, 3] = 0.6 * np.clip(looks * len(looks) - 1, 0, 1)  # full red at twice an equal share
    axes.imshow(tint, origin="lower", extent=extent, aspect="equal", interpolation="nearest")
    axes.set(xlabel=AXES[other], ylabel=AXES[axis], title="mean scan; red: more than its share")
