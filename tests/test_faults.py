"""Faults, in short, on real processes: kill -9, signals, a second process, damaged checkpoints, hostile inputs.

`make test-faults` does the same at length.
"""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from faults.corruption import count_corrupted_loads

from faults import small_chain
from faults.input_check import read_mutated
from faults.kills import kill_and_restart, list_differences
from ldae.data.transforms import Transform
from ldae.data.volumes import VolumeCache
from ldae.training.signals import StopSignals
from ldae.utils.entrypoint import explain
from ldae.utils.errors import EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from ldae.utils.locks import lock_folder
from ldae.utils.process_pool import DIED_REASON


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a stage 1 that was never disturbed, `whole`, and one that was killed on the way."""
    folder = tmp_path_factory.mktemp("faults")
    assert kill_and_restart(folder, 2, ("aekl",))["kills"] == 2
    return folder


def wait_for(folder: Path, text: str, limit: float = 300.0) -> None:
    end = time.monotonic() + limit
    while text not in small_chain.read_log(folder):
        assert time.monotonic() < end, small_chain.read_log(folder)[-2000:]
        time.sleep(0.02)


def test_a_signal_saves_a_second_process_is_refused_and_the_end_is_the_same(killed: Path, tmp_path: Path) -> None:
    folder, arguments = (
        tmp_path,
        small_chain.train_overrides("aekl", small_chain.copy_runs(killed / "whole", tmp_path, "aekl")),
    )
    process = small_chain.start_script("train", arguments, folder)
    wait_for(folder, "aekl 1/8")
    small_chain.send_signal(process, signal.SIGSTOP)
    second = small_chain.start_script("train", arguments, folder)
    second.join(300)
    assert second.exitcode == EXIT_USER_ERROR
    assert "another process writes to" in small_chain.read_log(folder)
    small_chain.send_signal(process, signal.SIGTERM)
    small_chain.send_signal(process, signal.SIGCONT)
    process.join(300)
    assert process.exitcode == EXIT_REQUEUE, small_chain.read_log(folder)[-2000:]
    small_chain.run_to_end("train", arguments, folder)
    assert "Traceback" not in small_chain.read_log(folder)
    assert not list_differences(folder / "runs/smoke/aekl", killed / "whole/runs/smoke/aekl")


def test_changed_settings_are_named_and_harmless_ones_pass(killed: Path, tmp_path: Path) -> None:
    folder, data = tmp_path, small_chain.copy_runs(killed / "whole", tmp_path)
    process = small_chain.start_script(
        "train", small_chain.train_overrides("aekl", data, "optim.lr=0.01", "trainer.log_every=3"), folder
    )
    process.join(300)
    assert process.exitcode == EXIT_USER_ERROR
    assert "optim.lr: 0.0001 -> 0.01" in small_chain.read_log(folder).splitlines()[-1]
    assert "trainer.log_every" not in small_chain.read_log(folder).splitlines()[-1]


def test_damaged_checkpoints_are_never_loaded(killed: Path, tmp_path: Path) -> None:
    assert count_corrupted_loads(killed / "whole/runs/smoke/aekl", tmp_path, 20)["loaded"] == 0


def test_hostile_inputs_are_refused_in_one_line(killed: Path, tmp_path: Path) -> None:
    outcomes = read_mutated(tmp_path / "inputs", killed / "whole/runs/smoke/aekl", 10)
    assert outcomes["bundle"] == outcomes["npz"] == {"refused": 10}
    assert all(sum(counts.values()) == 10 for counts in outcomes.values())


def _signalled_twice() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)


def test_a_second_signal_ends_a_process_at_once() -> None:
    process = multiprocessing.get_context("forkserver").Process(target=_signalled_twice)
    process.start()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM


class Deadly(Transform):
    """Takes its process down with one scan."""

    def __call__(self, source, *arguments, **options):
        if "deadly" in str(source):
            os._exit(9)
        return super().__call__(source, *arguments, **options)


def test_a_scan_that_takes_its_process_down_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldae.data.volumes.MIN_SCANS_PER_PROCESS", 1)
    for name in ("first", "deadly", "last"):
        image = nib.Nifti1Image(np.random.default_rng(0).random((9, 9, 9), np.float32), np.diag([2.0, 2, 2, 1]))
        nib.save(image, tmp_path / f"{name}.nii")
    cache = VolumeCache(tmp_path / "cache", Deadly((8, 8, 8), 2.0))
    scans = [str(tmp_path / f"{name}.nii") for name in ("first", "deadly", "last")]
    assert cache.build(scans, workers=2, progress=False) == {scans[1]: DIED_REASON}
    assert all(cache.file(scan).exists() for scan in (scans[0], scans[2]))


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


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with lock_folder(tmp_path), pytest.raises(UserError, match="another process writes to"), lock_folder(tmp_path):
        pass
    (tmp_path / ".lock").write_text("")
    with lock_folder(tmp_path):
        assert (tmp_path / ".lock").read_text()


def test_a_dead_holder_on_another_host_is_waited_for_and_a_living_one_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("ldae.utils.locks.DEAD", 0.2)
    (tmp_path / ".lock").write_text("elsewhere 17")
    with lock_folder(tmp_path):
        pass
    monkeypatch.setattr("ldae.utils.locks.DEAD", 60.0)
    monkeypatch.setattr("ldae.utils.locks.BEAT", 0.05)
    (tmp_path / ".lock").write_text("elsewhere 17")
    monkeypatch.setattr("time.sleep", lambda _: (tmp_path / ".lock").touch())
    with pytest.raises(UserError, match="process 17 on elsewhere"), lock_folder(tmp_path):
        pass
