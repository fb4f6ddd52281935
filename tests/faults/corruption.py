"""Checkpoints with bytes changed, lost or added: never loaded; the one before is."""

import random
import shutil
from pathlib import Path

from ldae.training.checkpoint import Checkpoints


def _flip(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def _blank(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data) // 2)
    data[start : start + len(data) // 3] = bytes(len(data) // 3)


def _grow(data: bytearray, draw: random.Random) -> None:
    data += draw.randbytes(draw.randrange(1, 100))


def _head(data: bytearray, draw: random.Random) -> None:
    data[draw.randrange(8)] ^= 0xFF  # safetensors: the length of the header


CHANGES = (_flip, _cut, _blank, _grow, _head)


def count_corrupted_loads(run: Path, folder: Path, count: int, seed: int = 0) -> dict[str, int]:
    """Damage the newest state of `run` in `count` ways; how many were loaded all the same."""
    draw = random.Random(seed)
    states = sorted((run / "state").glob("step_*.safetensors"))
    loaded = 0
    for number in range(count):
        place = folder / f"corrupted{number}"
        shutil.copytree(run / "state", place)
        newest = place / states[-1].name
        data = bytearray(newest.read_bytes())
        CHANGES[number % len(CHANGES)](data, draw)
        if bytes(data) == newest.read_bytes():
            _flip(data, draw)
        newest.write_bytes(bytes(data))
        loaded += Checkpoints(place, keep=2).newest() != place / states[-2].name
        shutil.rmtree(place)
    return {"corrupted checkpoints": count, "loaded": loaded}
