"""Compress a cohort with a trained autoencoder: one NPZ a scan, a table, and latents.json.

Processes take every n-th batch; what is done already, by the same autoencoder, is skipped.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from ldae.data.cohort import Cohort
from ldae.data.latents import latent_name, read_latent, write_about, write_latent
from ldae.data.likeness import ENOUGH, Likeness
from ldae.data.table import write_table
from ldae.data.transforms import Transform
from ldae.errors import UserError
from ldae.raw_scans import recorded
from ldae.runs import Run

log = logging.getLogger(__name__)


def encode_cohort(
    run: Run, cohort: Cohort, folder: Path, table: Path, accelerator: Accelerator, batch_size: int
) -> None:
    """Encode `cohort` with the autoencoder of `run` into `folder`; the last thing written is latents.json."""
    autoencoder = run.module("autoencoder", run.config.model.autoencoder).to(accelerator.device)
    weights = run.sha256("autoencoder")
    paths = [folder / latent_name(row.subject, row.session) for row in cohort.table.itertuples()]
    # Batches are cut from the whole table: in a batch of other company, sums round differently.
    batches = list(_chunks(np.arange(len(paths)), batch_size))
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    todo = [rows for rows in mine if not all(_done(paths[row], weights) for row in rows)]
    if len(todo) < len(mine):
        log.info("%d of %d batches of scans are encoded already", len(mine) - len(todo), len(mine))
    show = not accelerator.is_main_process
    with torch.inference_mode(), tqdm(todo, desc="encoding", unit="batch", disable=show) as bar:
        for rows in bar:
            mean, std = _posterior(autoencoder, cohort.volumes.batch(rows), accelerator)
            for row, m, s in zip(rows, mean, std, strict=True):
                write_latent(paths[row], m, s, weights)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(run, cohort, folder, table, paths, weights)
    accelerator.wait_for_everyone()


def _done(path: Path, weights: str) -> bool:
    if not path.exists():
        return False
    try:
        read_latent(path, weights)
    except UserError:
        return False
    return True


def _chunks(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _posterior(autoencoder: nn.Module, x: torch.Tensor, accelerator: Accelerator) -> tuple[np.ndarray, np.ndarray]:
    x = x.to(accelerator.device).to(memory_format=torch.channels_last_3d)
    with accelerator.autocast():
        mean, std = autoencoder.encode(x)
    return mean.float().cpu().numpy(), std.float().cpu().numpy()


def _finish(run: Run, cohort: Cohort, folder: Path, table: Path, paths: list[Path], weights: str) -> None:
    encoded: pd.DataFrame = cohort.table.assign(latent_path=[path.name for path in paths])
    name = f"{table.stem}_with_compressed_latent.csv"
    write_table(encoded, folder / name)
    cohort.write_rejected(folder / "rejected.csv")
    train = [path for path, split in zip(paths, cohort.table["split"], strict=True) if split == "train"]
    scale, shape = channel_scale(train)
    about: dict[str, Any] = {
        "table": name,
        "scans": len(paths),
        "rejected": len(cohort.rejected),
        "shape": shape,
        "scale": scale,
        "split_hash": cohort.split_hash,
        "autoencoder_sha256": weights,
        "autoencoder": run.metadata["step"],
        "transform": cohort.transform.key(),
        **_training_scans(cohort),
    }
    write_about(folder, about)
    log.info("%d latents of shape %s in %s; scale %s", len(paths), shape, folder, [round(s, 4) for s in scale])


def _training_scans(cohort: Cohort) -> dict[str, Any]:
    """What they look like (data/likeness.py), how they were made (raw_scans.py), and their common grid, if any."""
    rows = cohort.rows("train")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), ENOUGH)).astype(int)]
    paths = [cohort.table["path"].iloc[row] for row in rows]
    likeness = Likeness.measure(cohort.volumes[row] for row in rows)
    return {
        "likeness": None if likeness is None else likeness.to_dict(),
        "preprocess": recorded(paths),
        "affine": common_affine(paths, cohort.transform),
    }


def common_affine(paths: list[str], transform: Transform) -> list[list[float]] | None:
    """Voxel to mm, 4x4, of model space, where all scans of `paths` lie on one grid; else None."""
    grids = ((image.shape, image.affine) for image in map(nib.load, paths))
    shape, affine = next(grids)
    if not all(other == shape and np.allclose(matrix, affine, atol=1e-3) for other, matrix in grids):
        return None
    return transform.prepare(paths[0]).affine.tolist()


def channel_scale(paths: list[Path]) -> tuple[list[float], list[int]]:
    """1 / standard deviation by channel of posterior samples over the given latents, and a latent's shape.

    The variance of a sample is that of the means plus the mean of the posterior's own; sums run over one file at a
    time, so that 100 000 scans need no memory.
    """
    count, first, second, shape = 0, 0.0, 0.0, []
    for path in paths:
        mean, std = (array.astype(np.float64) for array in read_latent(path))
        shape = list(mean.shape)
        axes = tuple(range(1, mean.ndim))
        count += mean[0].size
        first = first + mean.sum(axes)
        second = second + (np.square(mean) + np.square(std)).sum(axes)
    variance = second / count - np.square(first / count)
    return [float(value) for value in 1 / np.sqrt(variance)], shape
