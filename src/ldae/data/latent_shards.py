"""What of a cohort is encoded already: a shard a batch, then one file of all.

A shard's name is a digest of the autoencoder and of the batch's scans, and a shard appears whole or not at all. Whether
it exists is thus all that any process needs to know, of this run or of one that was killed, and a scan that changed or
another autoencoder asks for another shard.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ldae.data.latent_file import LATENT_FILE, LatentFile, Posterior, digest_rows, write_latents
from ldae.data.latent_npz import npz_name, read_npz
from ldae.utils.errors import UserError
from ldae.utils.files import remove_temporaries

log = logging.getLogger(__name__)

SHARDS = "shards"


@dataclass(frozen=True)
class EncodedLatents:
    """Latents of the rows of a table, found in `folder` or written there."""

    folder: Path
    autoencoder: str  # hash of the weights
    row: np.ndarray  # (N, 16) uint8, which subject and session
    scan: np.ndarray  # (N, 16) uint8, which scan
    whole: LatentFile | None  # the file that an earlier run ended with
    places: np.ndarray  # (N,) int64, where in it a row is; -1: nowhere, or of another scan
    npz: Sequence[Path | None]  # (N,) or empty: files of an earlier version

    @classmethod
    def find(cls, folder: Path, autoencoder: str, table: pd.DataFrame, scan: np.ndarray) -> "EncodedLatents":
        """Look for what earlier runs left; latents of another autoencoder are never taken, and this is said.

        Args:
            table: rows with subject and session.
            scan: (N, 16) uint8, tells a changed scan from the one that was encoded.
        """
        row = digest_rows(table)
        whole, places, npz = None, np.full(len(row), -1), []
        if (folder / LATENT_FILE).exists():
            try:
                whole = LatentFile.open(folder / LATENT_FILE, autoencoder)
                places = whole.find_rows(row)
                places[(whole.scan[places] != scan).any(axis=1)] = -1
            except UserError as error:
                log.warning("all scans are encoded anew: %s", error)
        # Only until there is a file of all: NPZ files do not tell which scan they are of.
        elif folder.is_dir() and next(folder.glob("*.npz"), None) is not None:
            npz = [_usable(folder / npz_name(r.subject, r.session), autoencoder) for r in table.itertuples()]
            log.info("%d scans are taken from the NPZ files of an earlier version", sum(map(bool, npz)))
        return cls(folder, autoencoder, row, scan, whole, places, npz)

    def shard(self, rows: np.ndarray) -> Path:
        """The shard of the batch `rows`."""
        key = hashlib.sha256(self.autoencoder.encode() + self.row[rows].tobytes() + self.scan[rows].tobytes())
        return self.folder / SHARDS / f"{key.hexdigest()[:32]}.safetensors"

    def has(self, rows: np.ndarray) -> bool:
        """Whether the batch `rows` is encoded; its values are not read."""
        return bool((self.places[rows] >= 0).all()) or self._has_npz(rows) or self.shard(rows).exists()

    def write(self, rows: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
        """Keep the batch `rows`; mean and std are (B, C, X, Y, Z) float32."""
        write_latents(self.shard(rows), self.autoencoder, self.row[rows], self.scan[rows], [(mean, std)])

    def read(self, rows: np.ndarray) -> Posterior | None:
        """Mean and std of the batch `rows`, (B, C, X, Y, Z) float32; None where they are missing or damaged."""
        try:
            if self.shard(rows).exists():
                return LatentFile.open(self.shard(rows), self.autoencoder).read(np.arange(len(rows)))
            if self.whole is not None and (self.places[rows] >= 0).all():
                return self.whole.read(self.places[rows])
            if self._has_npz(rows):
                pairs = [read_npz(self.npz[row], self.autoencoder) for row in rows]
                mean, std = (np.stack(part) for part in zip(*pairs, strict=True))
                return mean, std
        except UserError as error:
            log.warning("encoded anew: %s", error)
        return None

    def merge(self, batches: Sequence[np.ndarray], encode: Callable[[np.ndarray], Posterior]) -> LatentFile:
        """Write the one file, unless it is there already; only for a process that is alone with the folder now.

        Args:
            batches: the rows of all batches, in order.
            encode: mean and std of a batch that turns out to be missing or damaged.
        """
        remove_temporaries(self.folder)
        if not self._is_finished():
            parts = (self.read(rows) or encode(rows) for rows in batches)
            write_latents(self.folder / LATENT_FILE, self.autoencoder, self.row, self.scan, parts)
        return LatentFile.open(self.folder / LATENT_FILE, self.autoencoder)

    def remove_shards(self) -> None:
        """Remove all shards, those of other tables and autoencoders too."""
        shutil.rmtree(self.folder / SHARDS, ignore_errors=True)

    def _has_npz(self, rows: np.ndarray) -> bool:
        return len(self.npz) > 0 and all(self.npz[row] for row in rows)

    def _is_finished(self) -> bool:
        same = self.whole is not None and np.array_equal(self.places, np.arange(len(self.whole)))
        return same and self.whole.is_intact()


def _usable(path: Path, autoencoder: str) -> Path | None:
    """`path`, if it holds a latent of this autoencoder."""
    if not path.exists():
        return None
    try:
        read_npz(path, autoencoder)
    except UserError as error:
        log.warning("encoded anew: %s", error)
        return None
    return path
