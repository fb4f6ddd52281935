"""A damaged checkpoint is never loaded: the training resumes from the one before it."""

from pathlib import Path

import pytest

from ldae.training.checkpoint import Checkpoints

from .damaged_checkpoints import damaged_copies
from .small_chain import STAGES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_checkpoint_is_passed_over(
    stage: str, undisturbed: Path, tmp_path: Path, repeats: int | None, seed: int
) -> None:
    state = undisturbed / "runs/smoke" / stage / "state"
    previous = sorted(state.glob("step_*.safetensors"))[-2].name
    for copy in damaged_copies(state, tmp_path, repeats or 20, seed):
        assert Checkpoints(copy, keep=2).newest() == copy / previous
