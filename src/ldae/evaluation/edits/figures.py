"""Figures of edits: slices with signed difference maps, dose-response curves, animations.

Volumes are (X, Y, Z) in RAS with intensities in [0, 1]; differences are in the same unit. `cut` is the voxel through
which the axial, coronal and sagittal slices go (`utils.slices.voxel_to_show`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ldae.evaluation.figures import open_figure, show_slice
from ldae.utils.files import replacing
from ldae.utils.slices import PLANES, slices_to_show

MARKERS = "os^vD<>P"  # one for each curve of a trade-off
COLOURS = {
    "ventricle": "tab:blue",
    "hippocampus": "tab:orange",
    "amygdala": "tab:green",
    "inferior_lateral_ventricle": "tab:cyan",
}
FRAME_MS = 180
IDENTITY = "SSIM to alpha = 0, in the brain"


def draw_strip(
    path: Path,
    volumes: Sequence[tuple[str, np.ndarray]],
    changes: Sequence[tuple[str, np.ndarray]],
    cut: tuple[int, int, int],
    title: str = "",
) -> None:
    """Labelled volumes in grey and labelled differences in colour, one column each, one row per plane.

    Differences share one symmetric scale (red = brighter) that ends at the 99.5th percentile of all of them.
    """
    limit = max(float(np.percentile(np.abs([change for _, change in changes]), 99.5)), 1e-3)
    columns = len(volumes) + len(changes)
    with open_figure(path, (1.75 * columns + 0.8, 5.4), 3, columns) as (figure, grid):
        bar = None
        for column, (label, volume) in enumerate((*volumes, *changes)):
            is_change = column >= len(volumes)
            low, high, colours = (-limit, limit, "RdBu_r") if is_change else (0, 1, "gray")
            for axes, (plane, image) in zip(grid[:, column], slices_to_show(volume, cut).items(), strict=True):
                drawn = show_slice(axes, image, plane, "k" if is_change else "w", vmin=low, vmax=high, cmap=colours)
            grid[0, column].set_title(label, fontsize=8)
            bar = drawn if is_change else bar
        for axes, plane in zip(grid[:, 0], PLANES, strict=True):
            axes.set_ylabel(plane, fontsize=8)
        if bar is not None:
            figure.colorbar(bar, ax=grid[:, -1], shrink=0.6, label="difference, fraction of the intensity range")
        figure.suptitle(title, fontsize=9)


def draw_dose_response(
    path: Path,
    alphas: Sequence[float],
    volumes: Mapping[str, np.ndarray],
    identity: np.ndarray,
    title: str = "",
    still: Sequence[str] = (),
) -> None:
    """Change of each structure's volume and of identity with alpha: a thin line per scan, the median in black.

    Args:
        volumes: mm3 by structure, (N, A) each.
        identity: SSIM to alpha = 0, (N, A).
        still: structures that the direction cannot move.
    """
    unedited = list(alphas).index(0.0)
    with open_figure(path, (4.2 * (len(volumes) + 1), 3.8), 1, len(volumes) + 1) as (figure, grid):
        figure.suptitle(title, fontsize=10)
        for axes, (name, measured) in zip(grid[:-1], volumes.items(), strict=True):
            kept = measured[measured[:, unedited] > 0]  # without contrast to its surroundings it has no volume
            change = 100 * (kept / kept[:, unedited : unedited + 1] - 1)
            axes.plot(alphas, change.T, color=COLOURS.get(name, "0.5"), alpha=0.25, linewidth=0.8)
            axes.plot(alphas, np.median(change, 0) if len(change) else np.full(len(alphas), np.nan), "ko-", linewidth=2)
            axes.axhline(0, color="0.7", linewidth=0.8)
            words = name.replace("_", " ")
            axes.set(xlabel="alpha", ylabel=f"change of {words} volume, %", title=f"{words}, {len(change)} scans")
            if name in still:
                axes.set_title(f"{words}: not moved by this direction", color="tab:red")
        grid[-1].plot(alphas, identity.T, color="0.6", alpha=0.4, linewidth=0.8)
        grid[-1].plot(alphas, np.median(identity, 0), "ko-", markersize=4, linewidth=2)
        grid[-1].set(xlabel="alpha", ylabel=IDENTITY, title=f"identity, {len(identity)} scans")


def draw_trade_off(path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str = "") -> None:
    """Identity against effect, one labelled curve (effect, identity) per setting; further up and right is better."""
    with open_figure(path, (8.5, 5.2)) as (_, axes):
        for number, (name, (effect, identity)) in enumerate(curves.items()):
            axes.plot(effect, identity, marker=MARKERS[number % len(MARKERS)], markersize=5, linewidth=1, label=name)
        axes.axvline(0, color="0.8", linewidth=0.8)
        axes.set(xlabel="change of ventricle volume from -alpha to +alpha, %", ylabel=IDENTITY)
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_maps(
    path: Path, rows: Sequence[tuple[str, np.ndarray, np.ndarray]], cut: tuple[int, int, int], quantity: str
) -> None:
    """Labelled volumes, one per row, each beside a map (X, Y, Z) of a quantity >= 0 with a common colour bar."""
    top = max(float(np.percentile([values for _, _, values in rows], 99.8)), 1e-3)
    with open_figure(path, (9.5, 1.55 * len(rows) + 0.4), len(rows), 6) as (figure, grid):
        grid = np.atleast_2d(grid)
        for axes_row, (label, volume, values) in zip(grid, rows, strict=True):
            for axes, (plane, image) in zip(axes_row[:3], slices_to_show(volume, cut).items(), strict=True):
                show_slice(axes, image, plane, "w", cmap="gray", vmin=0, vmax=1)
            for axes, (plane, image) in zip(axes_row[3:], slices_to_show(values, cut).items(), strict=True):
                drawn = show_slice(axes, image, plane, "w", cmap="magma", vmin=0, vmax=top)
            axes_row[0].set_ylabel(label, fontsize=8)
        figure.colorbar(drawn, ax=grid[:, -1], label=quantity)


def write_animation(
    path: Path, frames: np.ndarray, captions: Sequence[str], cut: tuple[int, int, int], scale: int = 3
) -> None:
    """Volumes (A, X, Y, Z) with a caption each as a GIF that runs forth and back, the three planes side by side.

    Args:
        scale: pixels per voxel, fewer for large volumes.
    """
    from PIL import Image, ImageDraw

    scale = max(1, min(scale, 480 // max(frames.shape[1:])))
    pictures = []
    for volume, caption in zip(frames, captions, strict=True):
        tiles = [np.kron(tile, np.ones((scale, scale))) for tile in slices_to_show(volume, cut).values()]
        height = max(len(tile) for tile in tiles)
        padded = [np.pad(tile, (((height - len(tile) + 1) // 2, (height - len(tile)) // 2), (2, 2))) for tile in tiles]
        row = np.pad(np.concatenate(padded, 1), ((0, 16), (0, 0)))
        picture = Image.fromarray((255 * row.clip(0, 1)).astype(np.uint8), "L")
        ImageDraw.Draw(picture).text((4, height + 2), f"{caption}   L left, R right", fill=230)
        pictures.append(picture)
    loop = pictures + pictures[-2:0:-1]
    with replacing(path) as temporary:
        loop[0].save(temporary, format="GIF", save_all=True, append_images=loop[1:], duration=FRAME_MS, loop=0)
