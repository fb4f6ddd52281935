"""Checkpoints with bytes changed, lost or added, none of which may be loaded."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path


def _flip_bit(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def _zero_a_third(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data) // 2)
    data[start : start + len(data) // 3] = bytes(len(data) // 3)


def _append(data: bytearray, draw: random.Random) -> None:
    data += draw.randbytes(draw.randrange(1, 100))


def _change_header_length(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(8)] ^= 0xFF  # the first 8 bytes of a safetensors file


DAMAGES = (_flip_bit, _truncate, _zero_a_third, _append, _change_header_length)


def damaged_copies(state: Path, folder: Path, count: int, seed: int = 0) -> Iterator[Path]:
    """Copy a run's state folder `count` times, each with its newest checkpoint damaged, and delete each after use."""
    draw = random.Random(seed)
    newest = max(state.glob("step_*.safetensors")).name
    for number in range(count):
        copy = folder / f"state{number}"
        shutil.copytree(state, copy)
        whole = (copy / newest).read_bytes()
        data = bytearray(whole)
        DAMAGES[number % len(DAMAGES)](data, draw)
        if bytes(data) == whole:
            _flip_bit(data, draw)
        (copy / newest).write_bytes(data)
        yield copy
        shutil.rmtree(copy)
