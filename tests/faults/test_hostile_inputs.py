"""Damaged and malicious inputs are read or refused in one line, in bounded time and memory, and never executed."""

from pathlib import Path

import pytest

from .input_check import KINDS, read_hostile_inputs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_inputs_are_read_or_refused_in_one_line(
    kind: str, undisturbed: Path, tmp_path: Path, repeats: int | None, seed: int
) -> None:
    count = repeats or 100
    outcomes = read_hostile_inputs(undisturbed / "runs/smoke/aekl", tmp_path / "inputs", count, (kind,), seed)
    assert outcomes[kind].total() == count
