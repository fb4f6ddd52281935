"""Command-line options, the order of test files, and the fixtures that several files share."""

import os
import shutil

# The tests run in as many workers as there are cores, so each works with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HYDRA_FULL_ERROR", "0")
os.environ.setdefault("MPLBACKEND", "Agg")  # set before matplotlib is imported

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from faults.scripts import run_script

if TYPE_CHECKING:
    from ldae import LDAE

# The slowest files start first, so that no worker is still busy with one of them when the others have finished.
SLOWEST = (
    "test_chain",
    "test_distributed",
    "test_rehearsal",
    "test_mistyped",
    "test_commands",
    "test_gpu_check",
    "test_official",
    "test_faults",
    "test_cross_validation",
    "test_preprocessing_scans",
    "test_bench",
    "test_raw_scan",
    "test_compile",
    "test_phantom_cohort",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the slow fault tests (`make test-faults`)."""
    group = parser.getgroup("fault tests")
    group.addoption(
        "--repeats", type=int, help="kills, damaged files or training steps in each; default: its own count"
    )
    group.addoption("--fault-seed", type=int, default=0, help="seed from which kills and damages are drawn")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files into the order in which workers take them (`--dist loadfile --no-loadscope-reorder`)."""
    items.sort(key=lambda item: SLOWEST.index(item.path.stem) if item.path.stem in SLOWEST else len(SLOWEST))


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the scripts have run `experiment=smoke` from phantoms to evaluation. Read only.

    It is made once for all workers of pytest-xdist, whose temporary folders have a parent in common.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "smoke"
    with FileLock(shared / "smoke.lock"):
        if not (folder / "finished").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            run_script("train", "experiment=smoke", "stage=aekl", cwd=folder)
            run_script("encode_latents", "experiment=smoke", cwd=folder)
            run_script("train", "experiment=smoke", "stage=pretrain", cwd=folder)
            run_script("train", "experiment=smoke", "stage=repr", cwd=folder)
            run_script("evaluate", "experiment=smoke", cwd=folder)
            (folder / "finished").touch()
    return folder


@pytest.fixture(scope="module")
def no_worker_processes() -> Iterator[None]:
    """What would run in worker processes runs in this one, which need not start three seconds for each command.

    tests/test_process_pool.py tests the workers, and tests/test_shards.py starts whole commands.
    """

    def run_here(
        function: Callable[..., object], items: Sequence[tuple[object, ...]], *_: object
    ) -> Iterator[tuple[int, object]]:
        yield from ((index, function(*item)) for index, item in enumerate(items))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldae.utils.process_pool.run_in_pools", run_here)
        yield


@pytest.fixture(scope="session")
def chain_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of the chains of faults/small_chain.py. The first of them fills it with phantoms."""
    return tmp_path_factory.mktemp("chain-data")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a very small model with random weights, a probe and an out-of-distribution check. Read only."""
    # Imported here, because the process that hands out the tests reads this file too and needs no torch.
    from ldae.data.transforms import Transform
    from small_run import small_run
    from small_scans import fit_ood_check

    return small_run(tmp_path_factory.mktemp("runs") / "small", fit_ood_check(Transform((8, 8, 8), 9.0)))


@pytest.fixture(scope="session")
def model(run: Path) -> "LDAE":
    """The model of `run` on the CPU. Read only."""
    from ldae import LDAE

    return LDAE.load(run, device="cpu")
