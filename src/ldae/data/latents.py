"""The latents of a cohort: a folder with latents.safetensors (see latent_file.py), a table and latents.json.

A sample of the latent of a scan is z = scale * (mean + std * noise). The scale, one number per channel, is measured on
the training split so that z has unit variance there.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldae.data.cohort import Cohort
from ldae.data.latent_file import LATENT_FILE, LatentFile, digest_rows
from ldae.data.latent_npz import read_npz
from ldae.data.table import read_table, scan_names, write_table
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, write_json

METADATA_FILE = "latents.json"
REJECTED_FILE = "rejected.csv"
PRECISIONS = ("no", "fp16", "bf16")  # that latents may have been computed in
CHUNK = 256  # rows that are read at a time; 31 MB at full size


@dataclass(frozen=True)
class LatentSet:
    """The latents of every encoded scan. On the CPU they are memory-mapped from their file, so never write to them.

    Attributes:
        table: subject, session, split, latent_path, ...; one row per latent.
        mean: (N, C, X, Y, Z) float32, posterior mean, unscaled.
        std: (N, C, X, Y, Z) float32, posterior standard deviation, unscaled.
        scale: (C,) float32.
        split_hash: of the split by subject that they were made with.
        autoencoder: hash of the weights of the autoencoder that made them.
        transform: key of the transform of the scans; empty if it was not recorded.
        scans: (N, 16) uint8, Cohort.digest_scans of the scans that were encoded; None if that was not recorded.
        precision: of the autoencoder as Accelerate names it; empty if it was not recorded.
    """

    table: pd.DataFrame
    mean: Tensor
    std: Tensor
    scale: Tensor
    split_hash: str
    autoencoder: str
    transform: str = ""
    scans: np.ndarray | None = None
    precision: str = ""

    @classmethod
    def open(cls, folder: Path) -> "LatentSet":
        """Open a folder that encode_latents.py wrote: one file of all latents, or one NPZ file per scan as formerly.

        The values in the file of all latents are not read here: encode_latents.py compares them with checksums.

        Raises:
            UserError: the folder is missing or unfinished, or a latent is missing or of another autoencoder.
        """
        check_latents(folder)
        metadata = _read_metadata(folder)
        table = read_table(folder / metadata["table"], require_files=False)
        mean, std, scans = _read_latents(table, folder, metadata["autoencoder_sha256"])
        if len(metadata["scale"]) != mean.shape[1]:
            raise UserError(f"{folder / METADATA_FILE} has another number of channels than its latents: encode again")
        scale = torch.tensor(metadata["scale"], dtype=torch.float32)
        names = ("split_hash", "autoencoder_sha256", "transform")
        texts = (metadata.get(name, "") for name in names)
        return cls(table, mean, std, scale, *texts, scans, metadata.get("precision", ""))

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split, int64."""
        return np.flatnonzero((self.table["split"] == split).to_numpy())

    def find_rows(self, table: pd.DataFrame) -> np.ndarray:
        """For each scan of `table` the row of its latent, by subject and session; -1 if it has none. (N,) int64."""
        key = ["subject", "session"]
        rows = {scan: row for row, scan in enumerate(self.table[key].itertuples(index=False, name=None))}
        return np.array([rows.get(scan, -1) for scan in table[key].itertuples(index=False, name=None)], dtype=np.int64)

    def find_outdated(self, cohort: Cohort) -> np.ndarray:
        """Rows of the cohort's scans whose latent was made of another version of the scan.

        Latents of earlier versions of this project that do not say what they were made of are not among them.
        """
        if self.scans is None:
            return np.zeros(0, dtype=np.int64)
        rows = self.find_rows(cohort.table)
        known = np.flatnonzero(rows >= 0)
        is_present = np.zeros(len(known), dtype=bool)
        for precision in (self.precision,) if self.precision else PRECISIONS:
            is_present |= (cohort.digest_scans(precision)[known] == self.scans[rows[known]]).all(axis=1)
        return known[~is_present]

    def sample(self, rows: Tensor | np.ndarray, noise: Tensor) -> Tensor:
        """Samples z of the posteriors of `rows` (B,), given standard normal `noise` (B, C, X, Y, Z), on the device."""
        rows = torch.as_tensor(rows, device=self.mean.device)
        scale = self.scale.to(self.mean.device).view(1, -1, 1, 1, 1)
        return scale * torch.addcmul(self.mean[rows], self.std[rows], noise.to(self.mean.device))

    def moments(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Voxel-wise mean and variance of z over `rows`, including the posterior's variance, (C, X, Y, Z) float32."""
        scale = self.scale.view(-1, 1, 1, 1).double()
        total = squares = torch.zeros(self.mean.shape[1:], dtype=torch.float64, device=self.mean.device)
        for chunk in split_into_chunks(rows):
            mean, std = self.mean[chunk].double(), self.std[chunk].double()
            total, squares = total + mean.sum(0), squares + mean.square().sum(0) + std.square().sum(0)
        mean = total / len(rows)
        return (scale * mean).float(), (scale.square() * (squares / len(rows) - mean.square())).float()

    def to(self, device: torch.device) -> "LatentSet":
        """The same latents on `device`."""
        tensors = {name: getattr(self, name).to(device) for name in ("mean", "std", "scale")}
        return replace(self, **tensors)


def check_latents(folder: Path) -> None:
    """Refuse a folder that encode_latents.py has not finished.

    Raises:
        UserError: it is not finished, or does not exist.
    """
    if not (folder / METADATA_FILE).exists():
        raise UserError(f"no latents in {folder}: run `python encode_latents.py` with the same name=... and data first")


def refuse_other_table(folder: Path, table: Path) -> None:
    """Refuse a table that does not exist, unless the latents in `folder` were made from a table of that name.

    Training on latents reads neither the table nor the scans, so they need not be on this machine.

    Raises:
        UserError: there is no such table.
    """
    if not table.is_file() and _read_metadata(folder)["table"] != latent_table_name(table):
        raise UserError(f"no such table: {table}")


def latent_table_name(table: Path) -> str:
    """Name of the table of latents that are made from `table`."""
    return f"{table.stem}_with_compressed_latent.csv"


def write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Write latents.json, with which the folder counts as finished."""
    write_json(folder / METADATA_FILE, metadata)


def copy_rejected(folder: Path, target: Path) -> None:
    """Copy the list of scans that were rejected when the latents in `folder` were made, if there is one."""
    if (folder / REJECTED_FILE).exists():
        rows = pd.read_csv(folder / REJECTED_FILE, dtype=str, keep_default_na=False)
        write_table(rows.assign(path=[os.path.abspath(folder / path) for path in rows["path"]]), target)


def split_into_chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """`rows` in consecutive parts that are read at a time."""
    for start in range(0, len(rows), CHUNK):
        yield rows[start : start + CHUNK]


def channel_scale(mean: Tensor, std: Tensor, rows: np.ndarray) -> list[float]:
    """The factor by which each channel of samples of the posterior has unit variance over `rows`.

    The variance of a sample is that of the means plus the mean variance of the posteriors. It is computed in NumPy
    chunk by chunk: memory for one chunk is enough, and the result does not depend on the number of threads.

    Args:
        mean: (N, C, X, Y, Z), on the CPU.
        std: (N, C, X, Y, Z), on the CPU.
    """
    first = second = 0.0
    for chunk in split_into_chunks(rows):
        m, s = (part[chunk].flatten(2).numpy().astype(np.float64) for part in (mean, std))
        first = first + m.sum((0, 2))
        second = second + np.einsum("ncv,ncv->c", m, m) + np.einsum("ncv,ncv->c", s, s)
    count = len(rows) * math.prod(mean.shape[2:])
    return [float(value) for value in 1 / np.sqrt(second / count - np.square(first / count))]


def _read_metadata(folder: Path) -> dict[str, Any]:
    """latents.json, with the types of its values checked."""
    path = folder / METADATA_FILE
    try:
        metadata = read_json(path)
        texts = [metadata[name] for name in ("table", "autoencoder_sha256", "split_hash")]
        good = all(isinstance(text, str) for text in texts) and metadata["table"] == Path(metadata["table"]).name
        if not good or not all(math.isfinite(value) and value > 0 for value in metadata["scale"]):
            raise ValueError("a value of the wrong type")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): run encode_latents.py again") from error
    return metadata


def _read_latents(table: pd.DataFrame, folder: Path, autoencoder: str) -> tuple[Tensor, Tensor, np.ndarray | None]:
    """Posterior mean and standard deviation of the rows of a table, (N, C, X, Y, Z), and LatentSet.scans."""
    if "latent_path" not in table:
        raise UserError(f"the table in {folder} has no latent_path: run encode_latents.py again")
    paths = table["latent_path"]
    # A folder of latents may come from elsewhere: its table must name no file outside of it.
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
    return mean, std, None


def _read_file(table: pd.DataFrame, folder: Path, autoencoder: str) -> tuple[Tensor, Tensor, np.ndarray]:
    """The same from the file of all latents: memory-mapped if the table has the same order, otherwise copied."""
    if table["latent_path"].nunique() != 1:
        raise UserError(f"the table in {folder} names other latents beside {LATENT_FILE}: run encode_latents.py again")
    file = LatentFile.open(folder / LATENT_FILE, autoencoder)
    places = file.find_rows(digest_rows(table))
    if (places < 0).any():
        name = scan_names(table, [int(np.argmin(places))])[0]
        raise UserError(f"{file.path} has no latent of {name}: run encode_latents.py again")
    if np.array_equal(places, np.arange(len(file))):
        return file.mean, file.std, file.scan
    return file.mean[places], file.std[places], file.scan[places]
