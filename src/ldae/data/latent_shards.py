"""Which latents of a cohort exist already: one shard per batch while encoding is under way, then one file of all.

The name of a shard is a digest of the autoencoder and of the scans of its batch, and a shard appears complete or not at
all. Its existence is therefore all that another process, or a later run, needs to know. A scan that has changed, or
another autoencoder, leads to another name.
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
    """The latents of the N rows of a table that exist in a folder, or will be written there.

    Attributes:
        folder: of the latents.
        autoencoder: hash of the weights.
        row: (N, 16) uint8, digest of subject and session.
        scan: (N, 16) uint8, digest of the version of the scan.
        whole: the file of all latents that an earlier run wrote; None if there is none.
        places: (N,) int64, place of each row in `whole`; -1 if it is missing or of another version of the scan.
        npz: (N,) files that an earlier version of this project wrote, None for a scan without one; or empty.
    """

    folder: Path
    autoencoder: str
    row: np.ndarray
    scan: np.ndarray
    whole: LatentFile | None
    places: np.ndarray
    npz: Sequence[Path | None]

    @classmethod
    def find(cls, folder: Path, autoencoder: str, table: pd.DataFrame, scan: np.ndarray) -> "EncodedLatents":
        """Look for the latents that earlier runs wrote. Those of another autoencoder are ignored, which is logged.

        Args:
            table: subject and session of N rows.
            scan: (N, 16) uint8, digest of the version of each scan.
        """
        row = digest_rows(table)
        whole, places, npz = None, np.full(len(row), -1), []
        if (folder / LATENT_FILE).exists():
            try:
                whole = LatentFile.open(folder / LATENT_FILE, autoencoder)
                places = whole.find_rows(row)
                places[(whole.scan[places] != scan).any(axis=1)] = -1
            except UserError as error:
                log.warning("all scans are encoded again: %s", error)
        # NPZ files do not say which version of a scan they are of: they are used until there is a file of all latents.
        elif folder.is_dir() and next(folder.glob("*.npz"), None) is not None:
            npz = [_usable(folder / npz_name(r.subject, r.session), autoencoder) for r in table.itertuples()]
            log.info("%d scans are taken from the NPZ files of an earlier version", sum(map(bool, npz)))
        return cls(folder, autoencoder, row, scan, whole, places, npz)

    def shard(self, rows: np.ndarray) -> Path:
        """The shard of the batch `rows`."""
        key = hashlib.sha256(self.autoencoder.encode() + self.row[rows].tobytes() + self.scan[rows].tobytes())
        return self.folder / SHARDS / f"{key.hexdigest()[:32]}.safetensors"

    def has(self, rows: np.ndarray) -> bool:
        """Whether the batch `rows` has been encoded. Its values are not read."""
        return bool((self.places[rows] >= 0).all()) or self._has_npz(rows) or self.shard(rows).exists()

    def write(self, rows: np.ndarray, mean: np.ndarray, std: np.ndarray) -> None:
        """Store the batch `rows`; mean and std are (B, C, X, Y, Z) float32."""
        for attempt in range(2):
            try:
                write_latents(self.shard(rows), self.autoencoder, self.row[rows], self.scan[rows], [(mean, std)])
                return
            except FileNotFoundError:  # another job has merged all shards meanwhile, and has removed their folder
                if attempt:
                    raise

    def read(self, rows: np.ndarray) -> Posterior | None:
        """The posteriors of the batch `rows`; None if they are missing or damaged."""
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
            log.warning("encoded again: %s", error)
        return None

    def merge(self, batches: Sequence[np.ndarray], encode: Callable[[np.ndarray], Posterior]) -> LatentFile:
        """Write the file of all latents, unless it exists. No other process may use the folder at the same time.

        Args:
            batches: the rows of all batches, in order.
            encode: gives the posteriors of a batch that turns out to be missing or damaged.
        """
        remove_temporaries(self.folder)
        if (
            self.whole is not None
            and np.array_equal(self.places, np.arange(len(self.whole)))
            and self.whole.is_intact()
        ):
            return self.whole
        parts = (self.read(rows) or encode(rows) for rows in batches)
        write_latents(self.folder / LATENT_FILE, self.autoencoder, self.row, self.scan, parts)
        return LatentFile.open(self.folder / LATENT_FILE, self.autoencoder)

    def remove_shards(self) -> None:
        """Remove all shards, including those of other tables and autoencoders."""
        shutil.rmtree(self.folder / SHARDS, ignore_errors=True)

    def _has_npz(self, rows: np.ndarray) -> bool:
        return len(self.npz) > 0 and all(self.npz[row] for row in rows)


def _usable(path: Path, autoencoder: str) -> Path | None:
    """`path`, if it is the latent of a scan by this autoencoder."""
    if not path.exists():
        return None
    try:
        read_npz(path, autoencoder)
    except UserError as error:
        log.warning("encoded again: %s", error)
        return None
    return path
