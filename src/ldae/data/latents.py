"""The latents of a cohort: one NPZ a scan with the posterior's mean and std, and latents.json about all of them.

z = scale * (mean + std * noise), with one scale per channel measured on the training split (unit variance there).
"""

import math
import os
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldae.errors import UserError
from ldae.files import read_json, replacing, write_json

ABOUT = "latents.json"
MAX_BYTES = 2**30  # of one array; at full size it is 60 kB

# What zipfile and NumPy raise on torn, foreign and nonsensical files.
_UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    KeyError,
    TypeError,
    SyntaxError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    RecursionError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


def latent_name(subject: str, session: str) -> str:
    """File name of a scan's latent."""
    return f"{subject}_{session}.npz"


def write_latent(path: Path, mean: np.ndarray, std: np.ndarray, autoencoder: str) -> None:
    """Write one scan's posterior, (C, X, Y, Z) float32, and the hash of the autoencoder that made it."""
    with replacing(path) as temporary:
        np.savez(temporary, mean=mean.astype(np.float32), std=std.astype(np.float32), autoencoder=np.str_(autoencoder))


def read_latent(path: Path | str, autoencoder: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of one scan, (C, X, Y, Z) float32.

    Raises:
        UserError: the file is missing or damaged, or was made by an autoencoder with another hash than `autoencoder`.
    """
    try:
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as archive:
            if autoencoder is not None and str(archive["autoencoder"]) != autoencoder:
                raise UserError(f"{path} was made by another autoencoder: run encode_latents.py again")
            mean, std = archive["mean"], archive["std"]
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read latent {path} ({reason}): run encode_latents.py again") from error
    if mean.dtype != np.float32 or std.dtype != np.float32:
        raise UserError(f"latent {path} does not hold float32: run encode_latents.py again")
    if mean.shape != std.shape or mean.ndim != 4 or not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise UserError(f"latent {path} is damaged: run encode_latents.py again")
    return mean, std


def _check_sizes(path: Path | str) -> None:
    """Refuse an archive that would unpack to much more than it should, before anything of it is unpacked."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as data:
                reader = np.lib.format
                major, _ = reader.read_magic(data)
                read_header = reader.read_array_header_1_0 if major == 1 else reader.read_array_header_2_0
                shape, _, dtype = read_header(data)
                need = dtype.itemsize * math.prod(shape)
                # NumPy allocates what the header says; the header may say anything.
                if member.file_size > MAX_BYTES or need != member.file_size - data.tell():
                    raise ValueError(f"its '{member.filename}' claims {need} bytes")


def check_latents(folder: Path) -> None:
    """Refuse a folder that encode_latents.py has not finished."""
    if not (folder / ABOUT).exists():
        raise UserError(f"no latents in {folder}: run `python encode_latents.py` with the same name=... and data first")


@dataclass(frozen=True)
class LatentSet:
    """The latents of every encoded scan, in memory."""

    table: pd.DataFrame  # subject, session, split, latent_path, ...
    mean: Tensor  # (N, C, X, Y, Z) float32, unscaled
    std: Tensor
    scale: Tensor  # (C,)
    split_hash: str
    autoencoder: str  # hash of its weights

    @classmethod
    def open(cls, folder: Path) -> "LatentSet":
        """Read a folder that encode_latents.py wrote.

        Raises:
            UserError: it is not there, not finished, or a latent is missing or foreign.
        """
        from ldae.data.table import read_table

        check_latents(folder)
        about = _read_about(folder)
        table = read_table(folder / about["table"], require_files=False)
        _check_places(table, folder)
        pairs = [read_latent(path, about["autoencoder_sha256"]) for path in table["latent_path"]]
        shapes = {mean.shape for mean, _ in pairs}
        if len(shapes) != 1:
            raise UserError(f"latents in {folder} differ in shape ({sorted(shapes)}): run encode_latents.py again")
        if len(about["scale"]) != pairs[0][0].shape[0]:
            raise UserError(f"{folder / ABOUT} has another number of channels than its latents: encode again")
        return cls(
            table=table,
            mean=torch.from_numpy(np.stack([mean for mean, _ in pairs])),
            std=torch.from_numpy(np.stack([std for _, std in pairs])),
            scale=torch.tensor(about["scale"], dtype=torch.float32),
            split_hash=about["split_hash"],
            autoencoder=about["autoencoder_sha256"],
        )

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
        for row in rows:
            mean = self.mean[row].double()
            total, squares = total + mean, squares + mean.square() + self.std[row].double().square()
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
    path = folder / ABOUT
    try:
        about = read_json(path)
        texts = [about[name] for name in ("table", "autoencoder_sha256", "split_hash")]
        good = all(isinstance(text, str) for text in texts) and about["table"] == Path(about["table"]).name
        if not good or not all(math.isfinite(value) and value > 0 for value in about["scale"]):
            raise ValueError("a value of the wrong kind")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): run encode_latents.py again") from error
    return about


def _check_places(table: pd.DataFrame, folder: Path) -> None:
    """A latents' table, which may come with them from elsewhere, names files of its own folder."""
    if "latent_path" not in table:
        raise UserError(f"the table in {folder} has no latent_path: run encode_latents.py again")
    for path in table["latent_path"]:
        if os.path.dirname(path) != os.path.abspath(folder):
            raise UserError(f"latent {path or '(empty)'} is not in {folder}: run encode_latents.py again")


def write_about(folder: Path, about: dict) -> None:
    """Write latents.json, which makes the folder count as finished."""
    write_json(folder / ABOUT, about)
