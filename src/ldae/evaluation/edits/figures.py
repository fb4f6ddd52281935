"""Pictures of edits: strips of slices with signed difference maps, dose-response curves, animations.

Slices of RAS volumes are turned for display: anterior and superior up, the subject's left on the viewer's left; L and
R are marked. Intensities are shares of the scan's range (0 to 1), and so are differences.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldae.evaluation.figures import open_figure
from ldae.utils.files import replacing

PLANES = ("axial", "coronal", "sagittal")
COLOURS = {"ventricle": "tab:blue", "hippocampus": "tab:orange"}
FRAME_MS = 180


def choose_cut(region: np.ndarray | None, shape: Sequence[int]) -> tuple[int, int, int]:
    """Voxel to cut at: the middle of `region` (X, Y, Z), else of the volume."""
    if region is None or not region.any():
        return shape[0] // 2, shape[1] // 2, shape[2] // 2
    x, y, z = np.rint(np.argwhere(region).mean(0)).astype(int).tolist()
    # Left and right are symmetric: the middle would show the thin wall between the ventricles.
    return min(x + max(1, shape[0] // 20), shape[0] - 1), y, z


def slices(volume: np.ndarray, cut: tuple[int, int, int]) -> list[np.ndarray]:
    """Axial, coronal and sagittal slices of a RAS volume (X, Y, Z) for display with the origin at the upper left."""
    x, y, z = cut
    return [np.flipud(plane.T) for plane in (volume[:, :, z], volume[:, y, :], volume[x])]


def _show(axes: Any, image: np.ndarray, plane: str, colour: str, **options: Any) -> Any:
    shown = axes.imshow(image, interpolation="nearest", **options)
    axes.set(xticks=[], yticks=[])
    for end, at in zip(("P", "A") if plane == "sagittal" else ("L", "R"), (0.05, 0.95), strict=True):
        axes.text(at, 0.5, end, color=colour, transform=axes.transAxes, ha="center", va="center", fontsize=7)
    return shown


def draw_strip(
    path: Path,
    shown: Sequence[tuple[str, np.ndarray]],
    changes: Sequence[tuple[str, np.ndarray]],
    cut: tuple[int, int, int],
    title: str = "",
) -> None:
    """Labelled volumes in grey beside labelled differences in colour, (X, Y, Z) each, a column each, planes below.

    Differences share one symmetric scale, red = brighter; its end is the 99.5th percentile of all of them.
    """
    limit = max(float(np.percentile(np.abs([change for _, change in changes]), 99.5)), 1e-3)
    columns = len(shown) + len(changes)
    with open_figure(path, (1.75 * columns + 0.8, 5.4), 3, columns) as (figure, grid):
        bar = None
        for place, (label, volume) in enumerate((*shown, *changes)):
            difference = place >= len(shown)
            low, high, colours = (-limit, limit, "RdBu_r") if difference else (0, 1, "gray")
            for axes, plane, image in zip(grid[:, place], PLANES, slices(volume, cut), strict=True):
                drawn = _show(axes, image, plane, "k" if difference else "w", vmin=low, vmax=high, cmap=colours)
            grid[0, place].set_title(label, fontsize=8)
            bar = drawn if difference else bar
        for axes, plane in zip(grid[:, 0], PLANES, strict=True):
            axes.set_ylabel(plane, fontsize=8)
        if bar is not None:
            figure.colorbar(bar, ax=grid[:, -1], shrink=0.6, label="difference, share of the intensity range")
        figure.suptitle(title, fontsize=9)


def draw_dose_response(
    path: Path, alphas: Sequence[float], volumes: Mapping[str, np.ndarray], identity: np.ndarray
) -> None:
    """Each scan's volumes (N, A) relative to alpha = 0 in percent, their median, and SSIM to alpha = 0 (N, A)."""
    middle = list(alphas).index(0.0)
    with open_figure(path, (4.2 * (len(volumes) + 1), 3.8), 1, len(volumes) + 1) as (_, grid):
        for axes, (name, measured) in zip(grid, volumes.items(), strict=False):
            kept = measured[measured[:, middle] > 0]  # a structure without contrast has no volume
            change = 100 * (kept / kept[:, middle : middle + 1] - 1)
            axes.plot(alphas, change.T, color=COLOURS.get(name, "0.5"), alpha=0.25, linewidth=0.8)
            axes.plot(alphas, np.median(change, 0) if len(change) else np.full(len(alphas), np.nan), "ko-", linewidth=2)
            axes.axhline(0, color="0.7", linewidth=0.8)
            axes.set(xlabel="alpha", ylabel=f"{name} volume, % of alpha = 0", title=f"{name}, {len(change)} scans")
        grid[-1].plot(alphas, identity.T, color="0.6", alpha=0.4, linewidth=0.8)
        grid[-1].plot(alphas, np.median(identity, 0), "ko-", markersize=4, linewidth=2)
        grid[-1].set(xlabel="alpha", ylabel="SSIM to alpha = 0, in the brain", title="identity")


def draw_trade_off(path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str = "") -> None:
    """Identity (y) against effect (x), a labelled point or curve each; better is further up and right."""
    from itertools import cycle

    with open_figure(path, (8.5, 5.2)) as (_, axes):
        for marker, (name, (effect, identity)) in zip(cycle("os^vD<>P"), curves.items(), strict=False):
            axes.plot(effect, identity, marker=marker, markersize=5, linewidth=1, label=name)
        axes.axvline(0, color="0.8", linewidth=0.8)
        axes.set(xlabel="change of ventricle volume from -alpha to +alpha, %", ylabel="SSIM to alpha = 0, in the brain")
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5))


def gap_curves(path: Path, curves: Mapping[str, Mapping[float, float]], ylabel: str) -> None:
    """A number of each method by gap in months."""
    with open_figure(path, (5.6, 4.0)) as (_, axes):
        for name, values in curves.items():
            axes.plot(list(values), list(values.values()), "o-", markersize=4, linewidth=1.4, label=name)
        axes.set(xlabel="months from first to last visit", ylabel=ylabel)
        axes.legend(fontsize=8)


def draw_maps(
    path: Path, rows: Sequence[tuple[str, np.ndarray, np.ndarray]], cut: tuple[int, int, int], unit: str
) -> None:
    """Labelled volumes (X, Y, Z), each beside a positive map of the same shape with a common colour bar."""
    top = max(float(np.percentile([row[2] for row in rows], 99.8)), 1e-3)
    with open_figure(path, (9.5, 1.55 * len(rows) + 0.4), len(rows), 6) as (figure, grid):
        for axes_row, (label, volume, values) in zip(np.atleast_2d(grid), rows, strict=True):
            images = (*slices(volume, cut), *slices(values, cut))
            for place, (axes, image) in enumerate(zip(axes_row, images, strict=True)):
                look = {"cmap": "gray", "vmax": 1} if place < 3 else {"cmap": "magma", "vmax": top}
                drawn = _show(axes, image, PLANES[place % 3], "w", vmin=0, **look)
            axes_row[0].set_ylabel(label, fontsize=8)
        figure.colorbar(drawn, ax=np.atleast_2d(grid)[:, -1], label=unit)


def write_animation(
    path: Path, frames: np.ndarray, captions: Sequence[str], cut: tuple[int, int, int], scale: int = 3
) -> None:
    """Volumes (A, X, Y, Z) in [0, 1] as a GIF that runs forth and back: the three planes beside each other."""
    from PIL import Image, ImageDraw

    largest = max(frames.shape[1:])
    scale = max(1, min(scale, 480 // largest))
    pictures = []
    for volume, caption in zip(frames, captions, strict=True):
        tiles = [np.kron(tile, np.ones((scale, scale))) for tile in slices(volume, cut)]
        height = max(len(tile) for tile in tiles)
        padded = [np.pad(tile, (((height - len(tile) + 1) // 2, (height - len(tile)) // 2), (2, 2))) for tile in tiles]
        row = np.pad(np.concatenate(padded, 1), ((0, 16), (0, 0)))
        picture = Image.fromarray((255 * row.clip(0, 1)).astype(np.uint8), "L")
        ImageDraw.Draw(picture).text((4, height + 2), f"{caption}   L left, R right", fill=230)
        pictures.append(picture)
    loop = pictures + pictures[-2:0:-1]
    with replacing(path) as temporary:
        loop[0].save(temporary, format="GIF", save_all=True, append_images=loop[1:], duration=FRAME_MS, loop=0)
