"""Two processes (gloo, on a CPU) train, encode and evaluate as one process does, and share work without deadlock.

`make test-faults` compares longer trainings, and outputs of three processes.
"""

import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from faults import distributed, small_chain
from ldae.data.phantom.synthetic_cohort import wait_for_cohort
from ldae.data.sharing import work_order
from ldae.data.transforms import Source, Transform
from ldae.data.volumes import VolumeCache
from ldae.utils.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, chain_data: Path) -> Path:
    """A folder in which one process has trained all stages for two steps."""
    folder = tmp_path_factory.mktemp("distributed") / "one"
    small_chain.train_chain(folder, chain_data, small_chain.STAGES, *distributed.training_settings(2, 1))
    return folder


@pytest.mark.parametrize("stage", small_chain.STAGES)
def test_two_processes_train_as_one_does(stage: str, trained: Path, tmp_path: Path) -> None:
    assert distributed.compare_training(trained, tmp_path, stage, steps=2) <= distributed.TOLERANCE


def test_two_processes_write_the_same_outputs_as_one(trained: Path, tmp_path: Path) -> None:
    distributed.compare_outputs(trained, tmp_path, counts=(1, 2))


def test_a_cache_that_takes_longer_than_the_timeout_is_built_by_both_processes(trained: Path, tmp_path: Path) -> None:
    """One process alone would need 24 s for the scans, and the other would stop waiting for it after 10 s."""
    folder = tmp_path
    data = [small_chain.copy_runs(trained, folder, "latents", "evaluation"), f"paths.cache={folder / 'cache'}"]
    scans = len(pd.read_csv(next((trained / "data").rglob("scans.csv"))))
    slow = ["data.transform._target_=faults.slow_transform.SlowTransform", f"+data.transform.seconds={24 / scans}"]
    settings = [*small_chain.SETTINGS, *distributed.training_settings(2, 1)]
    arguments = [*settings, *data, *slow, f"accelerator.timeout={10 / 60}"]
    small_chain.run_distributed("encode_latents", arguments, folder, 2)
    latents = [path / "runs/smoke/latents" for path in (trained, folder)]
    names = [*(path.name for path in latents[0].glob("*.safetensors")), "latents.json"]
    assert len(names) == 2
    assert [name for name in names if (latents[0] / name).read_bytes() != (latents[1] / name).read_bytes()] == []


def test_a_faster_process_transforms_the_volumes_that_a_slower_one_has_not_started(tmp_path: Path) -> None:
    """While the first process transforms its first scan, the second transforms all of them, its own share first."""
    scans, made = [str(tmp_path / f"{number}.nii") for number in range(6)], []
    for number, scan in enumerate(scans):
        data = np.random.default_rng(number).uniform(1, 100, (9, 9, 9)).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.diag([2.0, 2, 2, 1])), scan)

    class Recorded(Transform):
        def __call__(self, source: Source) -> np.ndarray:
            made.append(scans.index(str(source)))
            if len(made) == 1:
                assert VolumeCache(tmp_path / "cache", self).build(scans, 1, False, share=(1, 2))[1] == {}
            return super().__call__(source)

    cache = VolumeCache(tmp_path / "cache", Recorded((8, 8, 8), 2.0))
    volumes, rejected = cache.build(scans, 1, False, share=(0, 2))
    assert rejected == {}
    assert made[:4] == [0, 1, 3, 5]
    assert sorted(made) == [0, 0, 1, 2, 3, 4, 5]
    assert volumes.batch(range(6)).isfinite().all()


def test_the_work_order_of_every_process_contains_all_items_and_starts_with_its_own_share() -> None:
    for count, processes in ((10, 3), (3, 5), (0, 2), (7, 1)):
        orders = [work_order(count, rank, processes) for rank in range(processes)]
        assert all(sorted(order) == list(range(count)) for order in orders)
        own = [order[: len(range(rank, count, processes))] for rank, order in enumerate(orders)]
        assert sorted(np.concatenate(own)) == list(range(count)), "the shares do not overlap and cover all items"


def test_a_process_that_waits_for_phantoms_returns_with_the_table_or_gives_up(tmp_path: Path) -> None:
    table = tmp_path / "scans.csv"
    writer = threading.Timer(1.0, lambda: table.write_text("done"))
    writer.start()
    wait_for_cohort(table, patience=1.0)
    assert table.read_text() == "done"
    table.unlink()
    with pytest.raises(UserError, match="no phantom was added"):
        wait_for_cohort(table, patience=0.01)
