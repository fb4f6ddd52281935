"""kill -9 at random instants: whatever is started again with the same command ends as if it had never been killed.

Instants are drawn in processor time, so that they fall evenly over a run's work however busy the machine is.
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

LIMIT = 1800.0  # seconds of a run, on a machine that does much else
POLL = 0.002
JITTER = 0.02  # seconds beyond the processor time drawn: into a write that waits for the disk, too


def list_differences(run: Path, whole: Path) -> list[str]:
    """In what a run differs from one that was never disturbed: state, weights, metrics, TensorBoard."""
    found = []
    for path in sorted([*whole.glob("state/step_*.safetensors"), *whole.glob("weights/*.safetensors")]):
        other = run / path.relative_to(whole)
        mine, theirs = (load_file(p) if p.exists() else {} for p in (other, path))
        same = mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)
        found += [] if same else [str(path.relative_to(whole))]
    for name in ("metrics.jsonl", "weights/metadata.json"):
        mine, theirs = ((folder / name).read_text().splitlines() for folder in (run, whole))
        found += (
            []
            if [json.loads(s) if s[0] == "{" and s[-1] == "}" else s for s in mine]
            == [json.loads(s) if s[0] == "{" and s[-1] == "}" else s for s in theirs]
            else [name]
        )
    found += [] if read_tensorboard(run) == read_tensorboard(whole) else ["tensorboard"]
    return found


def read_tensorboard(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of every TensorBoard scalar, and steps of every picture."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars | {tag: [(e.step, 0.0) for e in events.Images(tag)] for tag in events.Tags()["images"]}


def kill_and_restart(
    folder: Path, count: int, stages: tuple[str, ...] = small_chain.STAGES, seed: int = 0
) -> dict[str, int]:
    """Kill runs of `stages` `count` times in all; the numbers of kills, finished runs, and runs that differ."""
    draw = random.Random(seed)
    whole = folder / "whole"
    small_chain.train_chain(whole, small_chain.STAGES[: small_chain.STAGES.index(stages[-1]) + 1])
    total = {"kills": 0, "finished runs": 0, "runs that differ": 0}
    for place, stage in enumerate(stages):
        share = count * (place + 1) // len(stages) - count * place // len(stages)
        spoilt = folder / stage
        arguments = small_chain.train_overrides(stage, small_chain.copy_runs(whole, spoilt))
        run = spoilt / "runs/smoke" / stage
        shutil.rmtree(run)
        seconds = small_chain.run_to_end("train", arguments, spoilt)  # its data is made
        while share > 0:
            shutil.rmtree(run)
            share -= _until_finished(spoilt, arguments, share, seconds, draw, total)
            total["finished runs"] += 1
            different = list_differences(run, whole / "runs/smoke" / stage)
            total["runs that differ"] += bool(different)
            if different:
                raise AssertionError(f"{stage} differs in {different}\n{small_chain.read_log(spoilt)[-5000:]}")
    return total


def _wait(process: BaseProcess, busy: float, jitter: float) -> None:
    """Until a process has used `busy` seconds of processor time, and `jitter` seconds more, or has ended."""
    end = time.monotonic() + LIMIT
    while process.is_alive() and small_chain.processor_seconds(process) < busy and time.monotonic() < end:
        process.join(POLL)
    process.join(jitter)


def _until_finished(
    folder: Path, arguments: list[str], limit: int, seconds: float, draw: random.Random, total: dict
) -> int:
    """Start train.py until it ends, killing it up to `limit` times; how often that was."""
    done = 0
    while True:
        process = small_chain.start_script("train", arguments, folder)
        _wait(process, draw.uniform(0, seconds) if done < limit else LIMIT, draw.uniform(0, JITTER))
        if process.exitcode is None:
            small_chain.send_signal(process)
            process.join()
            done += 1
            total["kills"] += 1
        elif process.exitcode == 0:
            return done
        else:
            raise AssertionError(f"{arguments}: exit {process.exitcode}\n{small_chain.read_log(folder)[-5000:]}")
