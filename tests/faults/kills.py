"""Kills a training with SIGKILL at random instants, starts it again, and compares the end with an undisturbed one.

The instants are drawn in processor time, so that they fall evenly over a run's work however busy the machine is.
"""

import json
import random
import shutil
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from . import small_chain

POLL = 0.002  # seconds between two looks at the processor time
JITTER = 0.02  # seconds waited at most beyond the instant drawn, so that kills also hit writes that wait for the disk


def list_differences(run: Path, undisturbed: Path) -> list[str]:
    """Names of what differs between two runs of a stage: states, weights, metrics, metadata, TensorBoard events."""
    found = []
    for path in sorted([*undisturbed.glob("state/step_*.safetensors"), *undisturbed.glob("weights/*.safetensors")]):
        name = path.relative_to(undisturbed)
        if not (run / name).exists() or not _same_tensors(run / name, path):
            found.append(str(name))
    if _read_records(run / "metrics.jsonl") != _read_records(undisturbed / "metrics.jsonl"):
        found.append("metrics.jsonl")
    if (run / "weights/metadata.json").read_text() != (undisturbed / "weights/metadata.json").read_text():
        found.append("weights/metadata.json")
    if read_tensorboard(run) != read_tensorboard(undisturbed):
        found.append("tensorboard")
    return found


def _same_tensors(path: Path, other: Path) -> bool:
    mine, theirs = load_file(path), load_file(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def _read_records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every TensorBoard scalar by its tag, and the steps of every image."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars | {tag: [(e.step, 0.0) for e in events.Images(tag)] for tag in events.Tags()["images"]}


def kill_and_restart(undisturbed: Path, folder: Path, stage: str, kills: int, seed: int = 0) -> int:
    """Train `stage` again and again, killing and restarting it, until it was killed `kills` times; compare each end.

    Args:
        undisturbed: folder in which the chain was trained without a kill, up to this stage at least.
        folder: where the killed runs are kept.

    Returns:
        Number of runs that reached their end, all of which equal the undisturbed one.

    Raises:
        AssertionError: a run failed, or its end differs.
    """
    draw = random.Random(f"{stage} {seed}")
    overrides = small_chain.train_overrides(stage, small_chain.copy_runs(undisturbed, folder))
    run = folder / "runs/smoke" / stage
    shutil.rmtree(run)
    seconds = small_chain.run_to_end("train", overrides, folder)
    finished = 0
    while kills > 0:
        shutil.rmtree(run)
        kills -= _train_through_kills(folder, overrides, kills, seconds, draw)
        finished += 1
        differences = list_differences(run, undisturbed / "runs/smoke" / stage)
        assert not differences, f"{stage} differs in {differences}\n{small_chain.read_log(folder)[-5000:]}"
    return finished


def _train_through_kills(folder: Path, overrides: list[str], limit: int, seconds: float, draw: random.Random) -> int:
    """Start train.py until it reaches its end; returns how often it was killed, `limit` times at most.

    Args:
        seconds: processor time of an undisturbed run.
    """
    kills = 0
    while True:
        process = small_chain.start_script("train", overrides, folder)
        if kills < limit:
            _wait_until_used(process, draw.uniform(0, seconds))
            process.join(draw.uniform(0, JITTER))
        else:
            process.join(small_chain.TIMEOUT)
        if process.exitcode == 0:
            return kills
        failure = f"{overrides}: exit {process.exitcode}\n{small_chain.read_log(folder)[-5000:]}"
        assert process.exitcode is None, failure
        process.kill()
        process.join()
        assert kills < limit, f"not finished after {small_chain.TIMEOUT} s: {failure}"
        kills += 1


def _wait_until_used(process: BaseProcess, seconds: float) -> None:
    """Wait until a process has used so much processor time, or has ended."""
    end = time.monotonic() + small_chain.TIMEOUT
    while process.is_alive() and small_chain.processor_seconds(process) < seconds and time.monotonic() < end:
        process.join(POLL)
