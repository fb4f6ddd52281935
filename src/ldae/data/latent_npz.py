"""Latents as one NPZ file per scan (`mean`, `std`, `autoencoder`): written by earlier versions, and still read.

The straight port in ldae.bench works on such files too.
"""

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ldae.utils.errors import UserError
from ldae.utils.files import replacing

MAX_BYTES = 2**30  # largest array that is read; at full size an array has 240 kB

# What zipfile and NumPy raise for truncated, foreign and damaged files.
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


def npz_name(subject: str, session: str) -> str:
    """Name of the file with the latent of a scan."""
    return f"{subject}_{session}.npz"


def write_npz(path: Path, mean: np.ndarray, std: np.ndarray, autoencoder: str) -> None:
    """Write the posterior of one scan, (C, X, Y, Z) each, and the hash of the autoencoder that made it."""
    with replacing(path) as temporary:
        np.savez(temporary, mean=mean.astype(np.float32), std=std.astype(np.float32), autoencoder=np.str_(autoencoder))


def read_npz(path: Path | str, autoencoder: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and standard deviation of one scan, (C, X, Y, Z) float32.

    Args:
        autoencoder: hash of the autoencoder that must have made it; None accepts any.

    Raises:
        UserError: the file is missing, damaged or of another autoencoder.
    """
    try:
        with open(path, "rb") as file:
            _check_sizes(file)
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                if autoencoder is not None and str(archive["autoencoder"]) != autoencoder:
                    raise UserError(f"{path} was made by another autoencoder: run encode_latents.py again")
                mean, std = archive["mean"], archive["std"]
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read latent {path} ({reason}): run encode_latents.py again") from error
    if mean.dtype != np.float32 or std.dtype != np.float32:
        raise UserError(f"latent {path} is not float32: run encode_latents.py again")
    if mean.shape != std.shape or mean.ndim != 4 or not (np.isfinite(mean).all() and np.isfinite(std).all()):
        raise UserError(f"latent {path} is damaged: run encode_latents.py again")
    return mean, std


def _check_sizes(file: BinaryIO) -> None:
    """Refuse an archive with an array that is larger than its data or than MAX_BYTES, before any of it is unpacked."""
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            with archive.open(member) as data:
                reader = np.lib.format
                major, _ = reader.read_magic(data)
                read_header = reader.read_array_header_1_0 if major == 1 else reader.read_array_header_2_0
                shape, _, dtype = read_header(data)
                need = dtype.itemsize * math.prod(shape)
                # NumPy would allocate whatever size a damaged header states.
                if member.file_size > MAX_BYTES or need != member.file_size - data.tell():
                    raise ValueError(f"its '{member.filename}' claims {need} bytes")
