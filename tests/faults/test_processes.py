"""Two processes train as one does over many steps, and one, two and three processes write the same outputs."""

from pathlib import Path

import pytest

from . import small_chain
from .distributed import TOLERANCE, compare_outputs, compare_training, training_settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def steps(repeats: int | None) -> int:
    """Optimiser steps of each training."""
    return repeats or 20


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, chain_data: Path, steps: int) -> Path:
    """A folder in which one process has trained all stages."""
    folder = tmp_path_factory.mktemp("processes") / "one"
    small_chain.train_chain(folder, chain_data, small_chain.STAGES, *training_settings(steps, 1))
    return folder


@pytest.mark.parametrize("stage", small_chain.STAGES)
def test_two_processes_train_as_one_does(stage: str, one: Path, tmp_path: Path, steps: int) -> None:
    assert compare_training(one, tmp_path, stage, steps) <= TOLERANCE


def test_one_two_and_three_processes_write_the_same_outputs(undisturbed: Path, tmp_path: Path) -> None:
    compare_outputs(undisturbed, tmp_path, (1, 2, 3))
