"""A fixed rotation that spreads a few numbers of very different size over many features."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor


def spreading_rotation(dim: int, columns: int) -> Tensor:
    """The first columns of an orthonormal matrix (dim, dim), whose elements are of about equal size: float32.

    The matrix is D (H x T): H is a Hadamard matrix (of the size of the largest power of 2 that divides `dim`), T the
    matrix of the discrete Hartley transform (of the size of the rest), and D has signs without pattern on its diagonal.
    The columns whose elements are all +-1/sqrt(dim) come first; there are 256 of them for 768. It is computed from
    these formulas alone, so that it is the same on every machine and in every version, up to the last digit of cosines.

    Returns:
        (dim, columns).
    """
    power = dim & -dim
    rest = dim // power
    row, column = np.arange(dim)[:, None], np.arange(columns)
    odd_bits = (row // rest) & (column % power)  # H is 1 where an even number of bits is set in both numbers, else -1
    for shift in (16, 8, 4, 2, 1):
        odd_bits ^= odd_bits >> shift
    angles = (2 * math.pi / rest) * ((row % rest) * (column // power))
    digest = np.frombuffer(hashlib.shake_256(b"signs of the spreading rotation").digest(dim), np.uint8)
    negative = (odd_bits ^ digest[:, None]) & 1
    matrix = np.where(negative, -1.0, 1.0) * (np.cos(angles) + np.sin(angles)) / math.sqrt(dim)
    return torch.from_numpy(matrix.astype(np.float32))
