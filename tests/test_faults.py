"""Kills, signals, a second process, damaged checkpoints and hostile inputs, on real processes: a short form.

`make test-faults` runs the kills, damages and inputs at length, for all stages.
"""

import errno
import os
import signal
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from faults.damaged_checkpoints import damaged_copies
from faults.input_check import read_hostile_inputs
from faults.kills import kill_and_restart, list_differences
from faults.scripts import start_process
from faults.small_chain import copy_runs, read_log, run_to_end, start_script, train_chain, train_overrides
from ldae.data.transforms import Transform
from ldae.data.volumes import VolumeCache
from ldae.training.checkpoint import Checkpoints
from ldae.training.signals import StopSignals
from ldae.utils.entrypoint import explain
from ldae.utils.errors import EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from ldae.utils.locks import lock_file, lock_folder, wait_for_lock
from ldae.utils.process_pool import DIED_REASON


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, chain_data: Path) -> Path:
    """A folder in which stage 1 was trained without a disturbance. Read only."""
    folder = tmp_path_factory.mktemp("faults") / "undisturbed"
    train_chain(folder, chain_data, ("aekl",))
    return folder


def wait_for(folder: Path, text: str, limit: float = 300.0) -> None:
    """Wait until the processes in `folder` have printed `text`."""
    end = time.monotonic() + limit
    while text not in read_log(folder):
        assert time.monotonic() < end, read_log(folder)[-2000:]
        time.sleep(0.02)


def test_a_killed_stage_ends_as_if_it_had_not_been_killed(trained: Path, tmp_path: Path) -> None:
    assert kill_and_restart(trained, tmp_path, "aekl", kills=2) > 0


def test_a_stopped_stage_saves_refuses_a_second_process_and_ends_as_if_undisturbed(
    trained: Path, tmp_path: Path
) -> None:
    overrides = train_overrides("aekl", copy_runs(trained, tmp_path, "aekl"))
    process = start_script("train", overrides, tmp_path)
    wait_for(tmp_path, "aekl 1/8")
    os.kill(process.pid, signal.SIGSTOP)
    second = start_script("train", overrides, tmp_path)
    second.join(300)
    assert second.exitcode == EXIT_USER_ERROR
    assert "another process writes to" in read_log(tmp_path)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    process.join(300)
    assert process.exitcode == EXIT_REQUEUE, read_log(tmp_path)[-2000:]
    run_to_end("train", overrides, tmp_path)
    assert "Traceback" not in read_log(tmp_path)
    assert not list_differences(tmp_path / "runs/smoke/aekl", trained / "runs/smoke/aekl")


def test_resuming_names_changed_settings_and_allows_harmless_ones(trained: Path, tmp_path: Path) -> None:
    overrides = train_overrides("aekl", copy_runs(trained, tmp_path), "optim.lr=0.01", "trainer.log_every=3")
    process = start_script("train", overrides, tmp_path)
    process.join(300)
    assert process.exitcode == EXIT_USER_ERROR
    assert "optim.lr: 0.0001 -> 0.01" in read_log(tmp_path).splitlines()[-1]
    assert "trainer.log_every" not in read_log(tmp_path).splitlines()[-1]


def test_a_damaged_checkpoint_is_passed_over(trained: Path, tmp_path: Path) -> None:
    state = trained / "runs/smoke/aekl/state"
    previous = sorted(state.glob("step_*.safetensors"))[-2].name
    for copy in damaged_copies(state, tmp_path, 20):
        assert Checkpoints(copy, keep=2).newest() == copy / previous


def test_hostile_inputs_are_read_or_refused_in_one_line(trained: Path, tmp_path: Path) -> None:
    outcomes = read_hostile_inputs(trained / "runs/smoke/aekl", tmp_path / "inputs", 10)
    assert outcomes["bundle"] == outcomes["npz"] == {"refused": 10}
    assert all(counts.total() == 10 for counts in outcomes.values())


def _signalled_twice() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def test_a_second_signal_ends_a_process_at_once() -> None:
    process = start_process(_signalled_twice)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM


class Deadly(Transform):
    """A transform that ends its process at a scan named deadly."""

    def __call__(self, source, *arguments, **options):
        if "deadly" in str(source):
            os._exit(9)
        return super().__call__(source, *arguments, **options)


def test_a_scan_that_takes_its_process_down_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldae.data.volumes.MIN_SCANS_PER_PROCESS", 1)
    scans = [str(tmp_path / f"{name}.nii") for name in ("deadly", "harmless")]
    for scan in scans:
        image = nib.Nifti1Image(np.random.default_rng(0).random((9, 9, 9), np.float32), np.diag([2.0, 2, 2, 1]))
        nib.save(image, scan)
    cache = VolumeCache(tmp_path / "cache", Deadly((8, 8, 8), 2.0))
    volumes, rejected = cache.build(scans, workers=2, progress=False)
    assert rejected == {scans[0]: DIED_REASON}
    assert list(volumes.scans) == scans[1:]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"), "lower trainer.batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "lower trainer.batch_size"),
        (OSError(errno.ENOSPC, "No space left on device", "x.npz"), "No space left on device: x.npz"),
        (PermissionError(errno.EACCES, "Permission denied", "runs"), "Permission denied: runs"),
    ],
)
def test_faults_of_the_machine_are_one_line(error: Exception, line: str) -> None:
    assert line in explain(error)
    assert "\n" not in explain(error)


def test_our_own_faults_keep_their_traceback() -> None:
    assert explain(RuntimeError("shapes do not match")) is None
    assert explain(FileNotFoundError(errno.ENOENT, "No such file", "x")) is None


def test_a_locked_folder_is_refused_and_unlocked_again(tmp_path: Path) -> None:
    line = rf"another process writes to {tmp_path} \(process {os.getpid()} on .*\): wait for it"
    with lock_folder(tmp_path), pytest.raises(UserError, match=line), lock_folder(tmp_path):
        pass
    with lock_folder(tmp_path), lock_folder(tmp_path, active=False):
        pass


def test_locks_can_be_held_by_every_member_of_a_group(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with lock_folder(tmp_path), lock_file(tmp_path / "y.csv", ""), wait_for_lock(tmp_path / ".tables"):
            modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert {modes[name] for name in (".lock", ".y.csv.lock", ".tables")} == {0o664}


def _hold(folder: Path) -> None:
    with lock_folder(folder):
        (folder / "held").touch()
        time.sleep(600)


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    process = start_process(_hold, tmp_path)
    end = time.monotonic() + 60
    while not (tmp_path / "held").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    with pytest.raises(UserError, match=rf"process {process.pid} on"), lock_folder(tmp_path):
        pass
    process.kill()
    process.join(60)
    with lock_folder(tmp_path):
        pass
