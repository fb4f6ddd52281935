"""What the fault tests share: the counts asked for, and a chain of stages that was trained without a disturbance."""

from pathlib import Path

import pytest

from . import small_chain


@pytest.fixture(scope="session")
def repeats(request: pytest.FixtureRequest) -> int | None:
    """The count of `--repeats`; None for each test's own."""
    return request.config.getoption("--repeats")


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of `--fault-seed`, from which kills and damages are drawn."""
    return request.config.getoption("--fault-seed")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, chain_data: Path) -> Path:
    """A folder in which all stages were trained without a disturbance. Read only."""
    folder = tmp_path_factory.mktemp("faults") / "undisturbed"
    small_chain.train_chain(folder, chain_data)
    return folder
