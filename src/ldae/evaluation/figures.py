"""Figures of the evaluations, each written atomically as a PNG.

Volumes are (X, Y, Z) in RAS, with intensities in [0, 1]; utils/slices.py says which way up their slices are shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldae.utils.files import replacing
from ldae.utils.slices import slices_to_show

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

PREDICTORS = {
    "embedding": "LDAE embedding",
    "mean": "no features",
    "age_sex": "age and sex",
    "pca_view": "PCA of the encoder's view",
    "pca_images": "PCA of scans",
    "pca": "PCA of latents",
    "pca_view_and_y": "PCA of the view, and y",
    "components": "components of y alone",
    "residual": "residual of y alone",
    "untrained_0": "untrained encoder",
    "supervised": "supervised, same encoder",
    "volumes": "region volumes",
    "volumes_head": "region volumes and head size",
}
UNITS = {"age": "years"}  # of numeric columns


@contextmanager
def open_figure(
    path: Path, size: tuple[float, float], rows: int = 1, columns: int = 1
) -> Iterator[tuple["Figure", Any]]:
    """A figure of `size` inches and its axes, saved to `path` at the end; needs no display and no global state.

    Yields:
        The figure, and its axes: one if rows = columns = 1, otherwise an array of them.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure, figure.subplots(rows, columns)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def draw_roc_curves(path: Path, truth: np.ndarray, predictions: Mapping[str, np.ndarray]) -> None:
    """ROC curve of every predictor; truth (N,) in {0, 1}, 1 = positive class."""
    from sklearn.metrics import roc_auc_score, roc_curve

    with open_figure(path, (5, 4.6)) as (_, axes):
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        for name, score in predictions.items():
            false, true, _ = roc_curve(truth, score)
            label = f"{PREDICTORS.get(name, name)}, AUC {roc_auc_score(truth, score):.3f}"
            axes.plot(false, true, label=label, linewidth=2.2 if name == "embedding" else 1.2)
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", title=f"ROC curves, {len(truth)} scans")
        axes.set_aspect("equal")
        axes.legend(loc="lower right", fontsize=8)


def draw_confusion_matrix(path: Path, truth: np.ndarray, probability: np.ndarray, classes: Sequence[str]) -> None:
    """Scans by true and predicted class at a threshold of 0.5; classes = (negative, positive)."""
    predicted = probability >= 0.5
    counts = np.array([[((truth == t) & (predicted == p)).sum() for p in (0, 1)] for t in (0, 1)])
    with open_figure(path, (3.4, 3.2)) as (_, axes):
        axes.imshow(counts, cmap="Blues", vmin=0, vmax=2 * max(counts.max(), 1))
        for (row, column), value in np.ndenumerate(counts):
            axes.text(column, row, str(value), ha="center", va="center", fontsize=14)
        axes.set(xticks=[0, 1], yticks=[0, 1], xticklabels=classes, yticklabels=classes)
        axes.set(xlabel="predicted class", ylabel="true class", title="number of scans")


def draw_scatter(path: Path, quantity: str, unit: str, truth: np.ndarray, prediction: np.ndarray) -> None:
    """Predicted against true values of a quantity, with the line of perfect prediction."""
    ends = [min(truth.min(), prediction.min()), max(truth.max(), prediction.max())]
    error = f"{np.abs(prediction - truth).mean():.2f} {unit}".strip()
    suffix = f", {unit}" if unit else ""
    with open_figure(path, (4.6, 4.4)) as (_, axes):
        axes.plot(ends, ends, color="0.8", linewidth=1)
        axes.plot(truth, prediction, "o", markersize=4, alpha=0.6)
        axes.set(xlabel=f"true {quantity}{suffix}", ylabel=f"predicted {quantity}{suffix}")
        axes.set_title(f"mean absolute error {error}, {len(truth)} scans", fontsize=10)


def show_slice(axes: "Axes", image: np.ndarray, plane: str, colour: str, **options: Any) -> "AxesImage":
    """Draw one slice of `slices_to_show` without ticks; marks left and right, or posterior and anterior, in `colour`.

    Args:
        options: of `Axes.imshow`.
    """
    shown = axes.imshow(image, interpolation="nearest", **options)
    axes.set(xticks=[], yticks=[])
    for end, at in zip(("P", "A") if plane == "sagittal" else ("L", "R"), (0.05, 0.95), strict=True):
        axes.text(at, 0.5, end, color=colour, transform=axes.transAxes, ha="center", va="center", fontsize=7)
    return shown


def draw_montage(path: Path, volumes: Sequence[tuple[str, np.ndarray]], title: str = "") -> None:
    """Labelled volumes, one per row, each as its three middle slices."""
    with open_figure(path, (7.5, 2.3 * len(volumes) + 0.4), len(volumes), 3) as (figure, grid):
        for axes_row, (label, volume) in zip(np.atleast_2d(grid), volumes, strict=True):
            for axes, (plane, image) in zip(axes_row, slices_to_show(volume).items(), strict=True):
                show_slice(axes, image, plane, "w", cmap="gray", vmin=0, vmax=1)
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
    """Curves (x, y) by their label; `level` is a labelled horizontal line, such as the best value possible."""
    with open_figure(path, (6.2, 4.4)) as (_, axes):
        for name, (x, y) in curves.items():
            axes.plot(x, y, "o-", markersize=4, label=name, linewidth=1.4)
        if level is not None:
            axes.axhline(level[1], color="0.5", linestyle="--", linewidth=1, label=level[0])
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log_x else "linear")
        axes.legend(fontsize=8)
