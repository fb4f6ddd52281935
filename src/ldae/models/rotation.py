"""A fixed rotation that spreads a few numbers of very different size over many features."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor


def spreading_rotation(dim: int) -> Tensor:
    """An orthonormal matrix (dim, dim) float32 whose first columns have elements of equal size, +-1/sqrt(dim).

    It is R = D (H x T): H is a Hadamard matrix (of the size of the largest power of 2 that divides `dim`), T the matrix
    of the discrete Hartley transform (of the size of the rest), and D has signs without pattern on its diagonal. The
    columns of equal size come first. It is computed from these formulas alone, so that it is the same on every machine
    and in every version, up to the last digit of cosines.
    """
    power = dim & -dim
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    odd = np.arange(dim // power)
    angles = 2 * math.pi * np.outer(odd, odd) / len(odd)
    matrix = np.kron(hadamard / math.sqrt(power), (np.cos(angles) + np.sin(angles)) / math.sqrt(len(odd)))
    order = np.arange(dim).reshape(power, len(odd)).T.ravel()  # first the columns of the constant Hartley mode
    digest = hashlib.shake_256(b"signs of the spreading rotation").digest(dim)
    signs = 1 - 2 * (np.frombuffer(digest, np.uint8)[:, None] & 1).astype(np.float64)
    return torch.from_numpy((signs * matrix[:, order]).astype(np.float32))
