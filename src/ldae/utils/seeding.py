"""Random draws that depend on a seed and keys alone, so that neither batch size nor number of processes changes them.

The key of a training sample is its position in the sample stream, that of a generated scan its number. Numbers are
drawn on the CPU, so that they are the same on every device.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed that depends on `seed` and on every key; unlike with seed + key, different uses do not collide."""
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def weights_seed(seed: int, stage: str, draw: int = 0) -> int:
    """The 32-bit seed of the initial weights of a stage.

    Args:
        stage: path of the stage's class.
        draw: 0 for the weights that training starts from, 1, 2, ... for further draws of them.
    """
    return derive_seed(seed, "weights", stage, *([draw] if draw else [])) % 2**32


def make_generator(seed: int, *keys: int | str) -> torch.Generator:
    """A generator on the CPU that is seeded with (seed, *keys)."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def draw_normal(shape: Sequence[int], seed: int, keys: Sequence[int], stream: int | str = 0) -> Tensor:
    """Standard normal noise, (B, *shape) for B keys. Row i depends on (seed, stream, keys[i]) alone."""
    return torch.stack([torch.randn(tuple(shape), generator=make_generator(seed, stream, int(key))) for key in keys])


def draw_timesteps(count: int, seed: int, keys: Sequence[int], stream: int | str = 0) -> Tensor:
    """Uniform timesteps in [0, count), (B,) int64 for B keys. Element i depends on (seed, stream, keys[i]) alone."""
    return torch.stack([torch.randint(count, (), generator=make_generator(seed, stream, int(key))) for key in keys])
