"""The latents of a cohort: one NPZ a scan with the posterior's mean and std, and latents.json about all of them.

z = scale * (mean + std * noise), with one scale per channel measured on the training split (unit variance there).
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldae.errors import UserError
from ldae.files import read_json, replacing, write_json

ABOUT = "latents.json"


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
        with np.load(path, allow_pickle=False) as archive:
            if autoencoder is not None and str(archive["autoencoder"]) != autoencoder:
                raise UserError(f"{path} was made by another autoencoder: run encode_latents.py again")
            mean, std = archive["mean"], archive["std"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read latent {path} ({error}): run encode_latents.py again") from error
    if mean.shape != std.shape or mean.ndim != 4 or not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise UserError(f"latent {path} is damaged: run encode_latents.py again")
    return mean, std


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
        about = read_json(folder / ABOUT)
        table = read_table(folder / about["table"], require_files=False)
        pairs = [read_latent(path, about["autoencoder_sha256"]) for path in table["latent_path"]]
        shapes = {mean.shape for mean, _ in pairs}
        if len(shapes) != 1:
            raise UserError(f"latents in {folder} differ in shape ({sorted(shapes)}): run encode_latents.py again")
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


def write_about(folder: Path, about: dict) -> None:
    """Write latents.json, which makes the folder count as finished."""
    write_json(folder / ABOUT, about)
