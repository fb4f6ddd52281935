"""The figures of an evaluation, each written atomically as a PNG."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ldae.utils.files import replacing

PREDICTOR_LABELS = {
    "embedding": "LDAE",
    "age_sex": "age + sex",
    "pca": "PCA of latents",
    "untrained": "untrained encoder",
}


@contextmanager
def open_figure(path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes (inches), saved to `path` on leaving; no display and no global state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure, figure.subplots(rows, columns)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_roc_curves(path: Path, truth: np.ndarray, predictions: Mapping[str, np.ndarray]) -> None:
    """ROC curves of all predictors; truth (N,) in {0, 1}, 1 = positive."""
    from sklearn.metrics import roc_auc_score, roc_curve

    with open_figure(path, (5, 4.6)) as (_, axes):
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        for name, score in predictions.items():
            false, true, _ = roc_curve(truth, score)
            label = f"{PREDICTOR_LABELS.get(name, name)}  {roc_auc_score(truth, score):.3f}"
            axes.plot(false, true, label=label, linewidth=2.2 if name == "embedding" else 1.2)
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", title=f"ROC, {len(truth)} scans", aspect="equal")
        axes.legend(loc="lower right", fontsize=8)


def draw_confusion_matrix(path: Path, truth: np.ndarray, probability: np.ndarray, classes: Sequence[str]) -> None:
    """Counts of truth against call at 0.5; classes = (negative, positive)."""
    called = probability >= 0.5
    counts = np.array([[((truth == t) & (called == c)).sum() for c in (0, 1)] for t in (0, 1)])
    with open_figure(path, (3.4, 3.2)) as (_, axes):
        axes.imshow(counts, cmap="Blues", vmin=0, vmax=2 * max(counts.max(), 1))
        for (row, column), value in np.ndenumerate(counts):
            axes.text(column, row, str(value), ha="center", va="center", fontsize=14)
        axes.set(xticks=[0, 1], yticks=[0, 1], xticklabels=classes, yticklabels=classes, xlabel="called", ylabel="is")


def draw_scatter(path: Path, column: str, truth: np.ndarray, prediction: np.ndarray) -> None:
    """Prediction against truth, with the identity."""
    ends = [min(truth.min(), prediction.min()), max(truth.max(), prediction.max())]
    error = np.abs(prediction - truth).mean()
    with open_figure(path, (4.6, 4.4)) as (_, axes):
        axes.plot(ends, ends, color="0.8", linewidth=1)
        axes.plot(truth, prediction, "o", markersize=4, alpha=0.6)
        axes.set(xlabel=f"{column}, true", ylabel=f"{column}, predicted", title=f"MAE {error:.2f}, {len(truth)} scans")


def orthogonal(volume: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """The three middle slices of a RAS volume (X, Y, Z), turned for display with origin at the upper left.

    Axial and coronal slices show the subject's right on the viewer's right (neurological), anterior or superior up.
    """
    x, y, z = (size // 2 for size in volume.shape)
    planes = {"axial": volume[:, :, z], "coronal": volume[:, y, :], "sagittal": volume[x]}
    return [(name, np.flipud(plane.T)) for name, plane in planes.items()]


def draw_montage(path: Path, rows: Sequence[tuple[str, np.ndarray]], title: str = "") -> None:
    """One labelled volume (X, Y, Z) in [0, 1] a row, in three planes; left and right are marked."""
    with open_figure(path, (7.5, 2.3 * len(rows) + 0.4), len(rows), 3) as (figure, grid):
        for axes_row, (label, volume) in zip(np.atleast_2d(grid), rows, strict=True):
            for axes, (plane, image) in zip(axes_row, orthogonal(volume), strict=True):
                axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                ends = ("P", "A") if plane == "sagittal" else ("L", "R")
                for end, at in zip(ends, (0.04, 0.96), strict=True):
                    axes.text(at, 0.5, end, color="w", transform=axes.transAxes, ha="center", va="center", fontsize=8)
            axes_row[0].set_ylabel(label, fontsize=9)
        figure.suptitle(title, fontsize=10)


def draw_curves(
    path: Path,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    log_x: bool = False,
    level: tuple[str, float] | None = None,
) -> None:
    """Labelled (x, y) curves; `level` draws a named horizontal line, such as a ceiling."""
    with open_figure(path, (6.2, 4.4)) as (_, axes):
        for name, (x, y) in curves.items():
            axes.plot(x, y, "o-", markersize=4, label=name, linewidth=1.4)
        if level is not None:
            axes.axhline(level[1], color="0.5", linestyle="--", linewidth=1, label=level[0])
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log_x else "linear")
        axes.legend(fontsize=8)
