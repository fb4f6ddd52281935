"""Random draws keyed by what they are for, so that neither batch size nor number of processes changes them.

A draw belongs to (seed, key, ...): the key of a training sample is its optimiser step and its global position in the
sample stream, that of a generated scan its number. Drawn on the CPU: the same numbers on every device.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed that depends on every key; unlike seed + key, no two uses collide."""
    digest = hashlib.sha256(repr((seed, *keys)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def make_generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator for (seed, *keys)."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def draw_normal(shape: Sequence[int], seed: int, keys: Sequence[int], stream: int | str = 0) -> Tensor:
    """Standard normal noise, (len(keys), *shape): row i depends on (seed, stream, keys[i]) alone."""
    return torch.stack([torch.randn(tuple(shape), generator=make_generator(seed, stream, int(key))) for key in keys])


def draw_timesteps(count: int, seed: int, keys: Sequence[int], stream: int | str = 0) -> Tensor:
    """Uniform timesteps in [0, count), (len(keys),) int64: row i depends on (seed, stream, keys[i]) alone."""
    return torch.stack([torch.randint(count, (), generator=make_generator(seed, stream, int(key))) for key in keys])
