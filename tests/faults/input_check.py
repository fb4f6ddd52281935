"""Reads hostile inputs in a process of limited memory: each must be read, or refused in one line, within seconds."""

import json
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldae.bundle.allowlist import refuse_oversized_network, refuse_untrusted_targets
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

from . import hostile_inputs, scripts

TIME_LIMIT = 10.0  # seconds of processor time for one input
PATIENCE = 300.0  # seconds without a result, on a busy machine, after which the process is ended
MEMORY_LIMIT = 6 * 2**30  # bytes


def _read_run(path: Path) -> None:
    run = Run(path)
    # One's own config may name any class. A model of someone else comes as a bundle, whose targets are checked so.
    node = run.config.model.autoencoder
    if isinstance(node, DictConfig):
        refuse_untrusted_targets(OmegaConf.to_container(node), str(path))
        refuse_oversized_network(OmegaConf.to_container(node), run.weights_file("autoencoder"))
    run.module("autoencoder", node)


WRITERS: dict[str, Callable[[Path, int, random.Random], Iterator[Path]]] = {
    "nifti": hostile_inputs.write_niftis, "npz": hostile_inputs.write_npzs, "table": hostile_inputs.write_tables,
    "bundle": hostile_inputs.write_bundles, "pytorch": hostile_inputs.write_checkpoints,
    "split": hostile_inputs.write_splits, "latents.json": hostile_inputs.write_latent_metadata,
    "latents": hostile_inputs.write_latent_files,
}  # fmt: skip
READERS: dict[str, Callable[[Path], object]] = {
    "nifti": Transform((8, 8, 8), 9.0), "npz": lambda path: read_npz(path, "hash"), "table": read_table,
    "bundle": Bundle.open, "pytorch": read_tensors, "split": read_split, "latents.json": LatentSet.open,
    "latents": lambda path: LatentFile.open(path, "hash"), "run": _read_run,
}  # fmt: skip
KINDS = tuple(READERS)


def _read_all(inputs: list[tuple[str, Path]], folder: Path) -> None:
    """Read each (kind, path) and append (kind, file name, outcome, seconds) to `folder`/results: a process's body."""
    # Imported first, so that the import is not counted as part of a reading.
    import monai.data
    import monai.transforms  # noqa: F401

    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    with open("results", "a", encoding="utf-8") as results:
        for kind, path in inputs:
            begin = time.process_time()
            outcome = _read(kind, path)
            results.write(json.dumps([kind, path.name, outcome, time.process_time() - begin]) + "\n")
            results.flush()


def _read(kind: str, path: Path) -> str:
    """ "read", or "refused" for an error that the scripts report in one line, or else the error."""
    try:
        READERS[kind](path)
    except Exception as error:  # noqa: BLE001  any error other than a refusal is what the test is to find
        line = explain(error)
        one_line = line is not None and "\n" not in line and "Traceback" not in line
        return "refused" if one_line else f"{type(error).__name__}: {str(error)[:200]}"
    return "read"


def read_hostile_inputs(
    run: Path, folder: Path, count: int, kinds: tuple[str, ...] = KINDS, seed: int = 0
) -> dict[str, Counter]:
    """Write `count` hostile inputs of each kind to `folder` and read them; numbers of "read" and "refused" by kind.

    Args:
        run: a finished run of stage 1.

    Raises:
        AssertionError: an input ended the process, took too long, failed without a one-line error, or was executed.
    """
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    writers = WRITERS | {"run": partial(hostile_inputs.write_run_configs, run=run)}
    inputs = [(kind, path) for kind in kinds for path in writers[kind](folder, count, draw)]
    found, exit_code = _results(inputs, folder)
    assert len(found) == len(inputs), f"the process died or hung (exit {exit_code}) at {inputs[len(found)]}"
    faults = [row for row in found if row[2] not in ("read", "refused") or row[3] > TIME_LIMIT]
    assert not faults, "\n".join(map(str, faults))
    assert not list(folder.rglob(hostile_inputs.CANARY)), "code from an input was executed"
    return {kind: Counter(row[2] for row in found if row[0] == kind) for kind in kinds}


def _results(inputs: list[tuple[str, Path]], folder: Path) -> tuple[list[tuple], int | None]:
    """Rows that the reading process wrote until it ended, or until it was ended for its silence, and its exit code."""
    results = folder / "results"
    results.touch()
    process = scripts.start_process(_read_all, inputs, folder)
    done, since = 0, time.monotonic()
    while process.is_alive():
        process.join(0.2)
        now = len(results.read_text().splitlines())
        if now > done:
            done, since = now, time.monotonic()
        if time.monotonic() - since > PATIENCE:
            process.kill()
    return [json.loads(line) for line in results.read_text().splitlines()], process.exitcode
