"""A training that is killed at random instants and started again ends as one that was never killed."""

from pathlib import Path

import pytest

from .kills import kill_and_restart
from .small_chain import STAGES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_as_if_it_had_not_been_killed(
    stage: str, undisturbed: Path, tmp_path: Path, repeats: int | None, seed: int
) -> None:
    assert kill_and_restart(undisturbed, tmp_path, stage, repeats or 17, seed) > 0
