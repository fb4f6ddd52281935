"""The latents of a cohort: a folder with latents.safetensors (latent_file.py), a table, and latents.json about all.

z = scale * (mean + std * noise), with one scale per channel measured on the training split (unit variance there).
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldae.data.latent_file import LATENT_FILE, LatentFile, digest_rows
from ldae.data.latent_npz import read_npz
from ldae.data.table import read_table, scan_names
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, write_json

METADATA_FILE = "latents.json"
CHUNK = 256  # rows that are read at once; at full size 31 MB


def check_latents(folder: Path) -> None:
    """Refuse a folder that encode_latents.py has not finished."""
    if not (folder / METADATA_FILE).exists():
        raise UserError(f"no latents in {folder}: run `python encode_latents.py` with the same name=... and data first")


@dataclass(frozen=True)
class LatentSet:
    """The latents of every encoded scan. On the CPU they are mapped from their file: never write to them."""

    table: pd.DataFrame  # subject, session, split, latent_path, ...
    mean: Tensor  # (N, C, X, Y, Z) float32, unscaled
    std: Tensor
    scale: Tensor  # (C,)
    split_hash: str
    autoencoder: str  # hash of its weights

    @classmethod
    def open(cls, folder: Path) -> "LatentSet":
        """Open a folder that encode_latents.py wrote, with one file of all latents, or with one NPZ a scan as of old.

        Of the one file no value is read here; encode_latents.py compares all with their checksums.

        Raises:
            UserError: it is not there, not finished, or a latent is missing or foreign.
        """
        check_latents(folder)
        about = _read_about(folder)
        table = read_table(folder / about["table"], require_files=False)
        mean, std = _read_latents(table, folder, about["autoencoder_sha256"])
        if len(about["scale"]) != mean.shape[1]:
            raise UserError(f"{folder / METADATA_FILE} has another number of channels than its latents: encode again")
        scale = torch.tensor(about["scale"], dtype=torch.float32)
        return cls(table, mean, std, scale, about["split_hash"], about["autoencoder_sha256"])

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split."""
        return np.flatnonzero((self.table["split"] == split).to_numpy())

    def sample(self, rows: Tensor | np.ndarray, noise: Tensor) -> Tensor:
        """z of `rows` for standard normal `noise`, (B, C, X, Y, Z), on the latents' device."""
        rows = torch.as_tensor(rows, device=self.mean.device)
        scale = self.scale.to(self.mean.device).view(1, -1, 1, 1, 1)
        return scale * torch.addcmul(self.mean[rows], self.std[rows], noise.to(self.mean.device))

    def moments(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Mean and variance of z over `rows`, the posterior's included, (C, X, Y, Z) float32."""
        scale = self.scale.view(-1, 1, 1, 1).double()
        total = squares = torch.zeros(self.mean.shape[1:], dtype=torch.float64, device=self.mean.device)
        for chunk in split_into_chunks(rows):
            mean, std = self.mean[chunk].double(), self.std[chunk].double()
            total, squares = total + mean.sum(0), squares + mean.square().sum(0) + std.square().sum(0)
        mean = total / len(rows)
        return (scale * mean).float(), (scale.square() * (squares / len(rows) - mean.square())).float()

    def to(self, device: torch.device) -> "LatentSet":
        """The same latents on `device`."""
        return LatentSet(
            self.table,
            self.mean.to(device),
            self.std.to(device),
            self.scale.to(device),
            self.split_hash,
            self.autoencoder,
        )


def _read_about(folder: Path) -> dict[str, Any]:
    """latents.json, with the values of the right kinds."""
    path = folder / METADATA_FILE
    try:
        about = read_json(path)
        texts = [about[name] for name in ("table", "autoencoder_sha256", "split_hash")]
        good = all(isinstance(text, str) for text in texts) and about["table"] == Path(about["table"]).name
        if not good or not all(math.isfinite(value) and value > 0 for value in about["scale"]):
            raise ValueError("a value of the wrong kind")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): run encode_latents.py again") from error
    return about


def _read_latents(table: pd.DataFrame, folder: Path, autoencoder: str) -> tuple[Tensor, Tensor]:
    """Mean and std of the rows of a table, (N, C, X, Y, Z), mapped from their file where it has the same order."""
    if "latent_path" not in table:
        raise UserError(f"the table in {folder} has no latent_path: run encode_latents.py again")
    paths = table["latent_path"]
    # A latents' table, which may come with them from elsewhere, names files of its own folder.
    for path in set(paths):
        if os.path.dirname(path) != os.path.abspath(folder):
            raise UserError(f"latent {path or '(empty)'} is not in {folder}: run encode_latents.py again")
    if LATENT_FILE in {os.path.basename(path) for path in set(paths)}:
        return _read_file(table, folder, autoencoder)
    pairs = [read_npz(path, autoencoder) for path in paths]
    shapes = {mean.shape for mean, _ in pairs}
    if len(shapes) != 1:
        raise UserError(f"latents in {folder} differ in shape ({sorted(shapes)}): run encode_latents.py again")
    mean, std = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
    return mean, std


def _read_file(table: pd.DataFrame, folder: Path, autoencoder: str) -> tuple[Tensor, Tensor]:
    if table["latent_path"].nunique() != 1:
        raise UserError(f"the table in {folder} names other latents beside {LATENT_FILE}: run encode_latents.py again")
    file = LatentFile.open(folder / LATENT_FILE, autoencoder)
    places = file.find_rows(digest_rows(table))
    if (places < 0).any():
        name = scan_names(table, [int(np.argmin(places))])[0]
        raise UserError(f"{file.path} has no latent of {name}: run encode_latents.py again")
    if np.array_equal(places, np.arange(len(file))):
        return file.mean, file.std
    return file.mean[places], file.std[places]


def split_into_chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """`rows` in runs that are read at once."""
    for start in range(0, len(rows), CHUNK):
        yield rows[start : start + CHUNK]


def channel_scale(mean: Tensor, std: Tensor, rows: np.ndarray) -> list[float]:
    """1 / standard deviation by channel of posterior samples over `rows` of (N, C, X, Y, Z), on the CPU.

    The variance of a sample is that of the means plus the mean of the posterior's own. Chunk by chunk, in NumPy: memory
    for one is enough, and the number of threads, which differs between one process and several, changes no bit.
    """
    first = second = 0.0
    for chunk in split_into_chunks(rows):
        m, s = (part[chunk].flatten(2).numpy().astype(np.float64) for part in (mean, std))
        first = first + m.sum((0, 2))
        second = second + np.einsum("ncv,ncv->c", m, m) + np.einsum("ncv,ncv->c", s, s)
    count = len(rows) * math.prod(mean.shape[2:])
    return [float(value) for value in 1 / np.sqrt(second / count - np.square(first / count))]


def write_metadata(folder: Path, about: dict) -> None:
    """Write latents.json, which makes the folder count as finished."""
    write_json(folder / METADATA_FILE, about)
