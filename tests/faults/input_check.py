"""Mutated NIfTI, NPZ, CSV, YAML, JSON and PyTorch files: refused in one line or read, in bounded time and memory."""

import json
import multiprocessing
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldae.bundle.allowlist import refuse_untrusted_targets
from ldae.bundle.bundle import Bundle
from ldae.data.latent_file import LatentFile
from ldae.data.latent_npz import read_npz
from ldae.data.latents import LatentSet
from ldae.data.splits import read_split
from ldae.data.table import read_table
from ldae.data.transforms import Transform
from ldae.models.state import read_tensors
from ldae.runs import Run
from ldae.utils.entrypoint import explain

from . import hostile_inputs
from .hostile_inputs import CANARY, Case

LIMIT = 10.0  # seconds of processor time
PATIENCE = 300.0  # seconds, for one input on a busy machine
MEMORY = 6 * 2**30


def _read_run(path: Path) -> None:
    run = Run(path)
    # A run's own config may name any class; one from a stranger comes as a bundle.
    node = run.config.model.autoencoder
    if isinstance(node, DictConfig):
        refuse_untrusted_targets(OmegaConf.to_container(node), str(path))
    run.module("autoencoder", node)


READ: dict[str, Callable[[Path], object]] = {
    "nifti": Transform((8, 8, 8), 9.0), "npz": lambda path: read_npz(path, "hash"), "csv": read_table,
    "yaml": _read_run, "bundle": Bundle.open, "pt": read_tensors, "split": read_split, "latents.json": LatentSet.open,
    "safetensors": lambda path: LatentFile.open(path, "hash"),
}  # fmt: skip


def _judge(cases: list[Case], folder: Path) -> None:
    """In a process of its own: read each case, one JSON line each."""
    # No part of what is timed.
    import monai.data
    import monai.transforms  # noqa: F401

    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open("results", "a", encoding="utf-8") as results:
        for kind, path in cases:
            begin = time.process_time()
            try:
                READ[kind](path)
                outcome = "read"
            except Exception as error:  # noqa: BLE001  what is looked for
                line = explain(error)  # as the scripts do
                fine = line is not None and "\n" not in line and "Traceback" not in line
                outcome = "refused" if fine else f"{type(error).__name__}: {str(error)[:200]}"
            results.write(json.dumps([kind, path.name, outcome, time.process_time() - begin]) + "\n")
            results.flush()


def _cases(folder: Path, run: Path, each: int, draw: random.Random) -> list[Case]:
    """`each` files of every kind."""
    kinds = (
        hostile_inputs.niftis, hostile_inputs.npzs, hostile_inputs.csvs, hostile_inputs.bundles, hostile_inputs.checkpoints, hostile_inputs.splits, hostile_inputs.abouts,
        hostile_inputs.latent_files,
    )  # fmt: skip
    return [case for make in kinds for case in make(folder, each, draw)] + [
        *hostile_inputs.yamls(folder, each, draw, run)
    ]


def read_mutated(folder: Path, run: Path, each: int, seed: int = 0) -> dict[str, dict[str, int]]:
    """Read `each` mutated inputs of every kind; outcomes by kind. `run` is a finished run of stage 1."""
    folder.mkdir(parents=True)
    cases = _cases(folder, run, each, random.Random(seed))
    results = folder / "results"
    results.touch()
    process = multiprocessing.get_context("forkserver").Process(target=_judge, args=(cases, folder))
    process.start()
    done, since = 0, time.monotonic()
    while process.is_alive():
        process.join(0.2)
        now = len(results.read_text().splitlines())
        done, since = (now, time.monotonic()) if now > done else (done, since)
        if time.monotonic() - since > PATIENCE:
            process.kill()
    found = [json.loads(line) for line in results.read_text().splitlines()]
    outcomes: dict[str, Counter] = {kind: Counter() for kind in READ}
    for kind, _, outcome, _ in found:
        outcomes[kind][outcome] += 1
    assert len(found) == len(cases), f"the process died or hung (exit {process.exitcode}) at {cases[len(found)]}"
    faults = [row for row in found if row[2] not in ("read", "refused") or row[3] > LIMIT]
    assert not faults, "\n".join(map(str, faults))
    assert not list(folder.rglob(CANARY)), "something was executed"
    return {kind: dict(counts) for kind, counts in outcomes.items()}
