"""Many latents in one safetensors file (huggingface.co/docs/safetensors), which is memory-mapped when it is opened.

mean, std   (N, C, X, Y, Z) float32, posterior mean and standard deviation of each scan
row         (N, 16) uint8, digest of subject and session
scan        (N, 16) uint8, digest of the version of the scan's file and of how it was encoded
checksum    (N, 16) uint8, digest of mean and std
header      autoencoder: hash of the weights that made the latents
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldae.utils.errors import UserError
from ldae.utils.files import replacing

LATENT_FILE = "latents.safetensors"
DIGEST = 16  # bytes

Posterior = tuple[np.ndarray, np.ndarray]  # mean and standard deviation, (B, C, X, Y, Z) float32 each


def digest_each(values: Iterable[bytes]) -> np.ndarray:
    """The first 16 bytes of the SHA-256 of each value, (N, 16) uint8."""
    joined = b"".join(hashlib.sha256(value).digest()[:DIGEST] for value in values)
    return np.frombuffer(joined, np.uint8).reshape(-1, DIGEST)


def digest_rows(table: pd.DataFrame) -> np.ndarray:
    """Digest of subject and session of each row of a table, (N, 16) uint8."""
    pairs = zip(table["subject"], table["session"], strict=True)
    return digest_each(f"{subject}\t{session}".encode() for subject, session in pairs)


def checksum_rows(mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Digest of the values of each row, (B, 16) uint8."""
    return digest_each(m.tobytes() + s.tobytes() for m, s in zip(mean, std, strict=True))


@dataclass(frozen=True)
class LatentFile:
    """An opened file of latents. Attributes are named as in the file; mean and std are read from disk when used."""

    path: Path
    mean: Tensor
    std: Tensor
    row: np.ndarray
    scan: np.ndarray
    checksum: np.ndarray

    @classmethod
    def open(cls, path: Path, autoencoder: str) -> "LatentFile":
        """Map a file. Names, types and shapes are checked; values are not read (see `is_intact`).

        Raises:
            UserError: it is missing, damaged, of another kind or of another autoencoder.
        """
        try:
            with safe_open(path, "pt") as file:
                made_by = (file.metadata() or {}).get("autoencoder")
                mean, std = file.get_tensor("mean"), file.get_tensor("std")
                row, scan, checksum = (file.get_tensor(name).numpy() for name in ("row", "scan", "checksum"))
        except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot read latents {path} ({reason}): run encode_latents.py again") from error
        if made_by != autoencoder:
            raise UserError(f"{path} was made by another autoencoder: run encode_latents.py again")
        if mean.ndim != 5 or len(mean) == 0 or std.shape != mean.shape or {mean.dtype, std.dtype} != {torch.float32}:
            raise UserError(
                f"{path} does not have mean and std as float32 (N, C, X, Y, Z): run encode_latents.py again"
            )
        if any(index.shape != (len(mean), DIGEST) or index.dtype != np.uint8 for index in (row, scan, checksum)):
            raise UserError(f"{path} does not say which scans its latents are of: run encode_latents.py again")
        return cls(path, mean, std, row, scan, checksum)

    def __len__(self) -> int:
        return len(self.row)

    def find_rows(self, row: np.ndarray) -> np.ndarray:
        """Places in this file of the latents with the digests `row`, (N, 16) uint8; (N,) int64, -1 if there is none."""
        places = {digest.tobytes(): place for place, digest in enumerate(self.row)}
        return np.array([places.get(digest.tobytes(), -1) for digest in row], dtype=np.int64)

    def read(self, places: np.ndarray) -> Posterior | None:
        """The posteriors at `places` (B,); None if a value does not agree with its checksum."""
        mean, std = self.mean[places].numpy(), self.std[places].numpy()
        return (mean, std) if np.array_equal(checksum_rows(mean, std), self.checksum[places]) else None

    def is_intact(self) -> bool:
        """Whether all values agree with their checksums; reads the whole file."""
        return all(self.read(np.array([place])) is not None for place in range(len(self)))


def write_latents(
    path: Path, autoencoder: str, row: np.ndarray, scan: np.ndarray, batches: Iterable[Posterior]
) -> None:
    """Write the latents of N rows atomically, one batch at a time, so that memory for one batch is enough.

    Args:
        autoencoder: hash of the weights that made them.
        row: (N, 16) uint8, digest of subject and session.
        scan: (N, 16) uint8, digest of the version of the scan.
        batches: the posteriors of all rows, in order.

    Raises:
        UserError: batches differ in shape.
    """
    batches = iter(batches)
    first = next(batches)
    shape = first[0].shape[1:]
    sizes = {"mean": (len(row), *shape), "std": (len(row), *shape)}
    sizes |= {name: row.shape for name in ("row", "scan", "checksum")}
    with replacing(path) as temporary, open(temporary, "wb") as file:
        starts = _write_header(file, sizes, autoencoder)
        found, done, each = [], 0, 4 * math.prod(shape)
        for posterior in _chained(first, batches):
            mean, std = (np.ascontiguousarray(part, dtype=np.float32) for part in posterior)
            if not mean.shape == std.shape == (len(mean), *shape):
                raise UserError(f"latents for {path} differ in shape: {mean.shape[1:]}, {std.shape[1:]}, {shape}")
            for name, part in (("mean", mean), ("std", std)):
                file.seek(starts[name] + done * each)
                file.write(part.tobytes())
            found.append(checksum_rows(mean, std))
            done += len(mean)
        if done != len(row):
            raise ValueError(f"{done} latents for {len(row)} rows")
        for name, index in (("row", row), ("scan", scan), ("checksum", np.concatenate(found))):
            file.seek(starts[name])
            file.write(np.ascontiguousarray(index, dtype=np.uint8).tobytes())


def _chained(first: Posterior, rest: Iterable[Posterior]) -> Iterable[Posterior]:
    yield first
    yield from rest


def _write_header(file: BinaryIO, sizes: dict[str, tuple[int, ...]], autoencoder: str) -> dict[str, int]:
    """Write the header of the safetensors format. Returns the offset of each tensor in the file, in bytes."""
    header: dict[str, dict] = {"__metadata__": {"autoencoder": autoencoder}}
    starts, end = {}, 0
    for name, shape in sizes.items():
        kind, width = ("F32", 4) if name in ("mean", "std") else ("U8", 1)
        starts[name], end = end, end + width * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    file.write(len(text).to_bytes(8, "little") + text)
    return {name: start + 8 + len(text) for name, start in starts.items()}
