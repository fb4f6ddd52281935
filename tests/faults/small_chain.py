"""The chain of stages at its smallest, run by the scripts' own functions in processes that the tests may disturb."""

import logging
import os
import shutil
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from ldae.config import compose_config
from ldae.experiment import encode, evaluate, train
from ldae.utils.entrypoint import one_line_errors

from . import scripts

STAGES = ("aekl", "pretrain", "repr")
TIMEOUT = 1800.0  # seconds for one script, on a machine that is busy with other work
# The smallest networks that have every part: the fault tests exercise the training loop, not the networks.
SMALL = (
    "data.shape=[8,8,8]", "model.autoencoder.channels=[8,8]", "model.autoencoder.groups=4",
    "model.autoencoder.latent_channels=4", "model.unet.base=8", "model.unet.groups=4", "model.unet.residual_blocks=1",
    "model.discriminator.channels=4", "model.discriminator.num_layers_d=1", "model.estimator.modes=2",
    "model.encoder.dim=16", "model.encoder.backbone.widths=[4,8]", "model.encoder.backbone.out_channels=8",
)  # fmt: skip
# Checkpoints, validations, previews and log lines fall on different steps; dropout, gradient accumulation and the
# discriminator are switched on.
SETTINGS = (
    "experiment=smoke", *SMALL, "trainer.max_steps=8", "trainer.batch_size=1", "trainer.accumulate=2",
    "trainer.log_every=1", "trainer.validate_every=3", "trainer.preview_every=4", "trainer.checkpoint_every=2",
    "trainer.validation_scans=1", "data.phantom.subjects=8", "data.workers=1",
)  # fmt: skip


def train_overrides(stage: str, *more: str) -> list[str]:
    """Overrides with which train.py trains `stage`."""
    sampler = ["stage.sampler.steps=2"] if stage == "repr" else []
    return [*SETTINGS, f"stage={stage}", *sampler, *more]


def run_in_folder(script: str, overrides: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a script's function with `folder` as working folder, and write its output to `folder`/log."""
    scripts.enter_folder(folder, environment, Path("log"), Path("log"))
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with one_line_errors():
        {"train": train, "encode_latents": encode, "evaluate": evaluate}[script](compose_config(script, overrides))


def start_script(
    script: str, overrides: list[str], folder: Path, environment: dict[str, str] | None = None
) -> BaseProcess:
    """Start a process that runs a script, with further environment variables."""
    return scripts.start_process(run_in_folder, script, overrides, folder, environment or {})


def processor_seconds(process: BaseProcess) -> float:
    """Processor time that a process has used, in seconds; 0 once it has ended."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime of proc(5)


def run_to_end(script: str, overrides: list[str], folder: Path) -> float:
    """Run a script to its end; returns the processor time that it used, in seconds.

    Raises:
        AssertionError: it failed, or did not end within `TIMEOUT`.
    """
    end, used = time.monotonic() + TIMEOUT, 0.0
    process = start_script(script, overrides, folder)
    while process.is_alive() and time.monotonic() < end:
        used = max(used, processor_seconds(process))
        process.join(0.02)
    if process.exitcode != 0:
        process.kill()
        raise AssertionError(f"{script} {overrides}: exit {process.exitcode}\n{read_log(folder)[-3000:]}")
    return used


def run_distributed(script: str, overrides: list[str], folder: Path, count: int) -> None:
    """Run a script to its end in `count` processes, started as `accelerate launch` or srun would start them.

    Raises:
        AssertionError: one of them failed, or did not end within `TIMEOUT`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    processes = [
        start_script(script, overrides, folder, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        if count > 1
        else start_script(script, overrides, folder)
        for rank in range(count)
    ]
    end = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    if codes != [0] * count:
        for process in processes:
            process.kill()
        raise AssertionError(f"{script} {overrides}: exits {codes}\n{read_log(folder)[-3000:]}")


def read_log(folder: Path) -> str:
    """What the processes in `folder` have printed so far."""
    path = folder / "log"
    return path.read_text(errors="replace") if path.exists() else ""


def train_chain(folder: Path, data: Path, stages: tuple[str, ...] = STAGES, *more: str) -> None:
    """Train `stages` in `folder` without a disturbance, and encode the latents that the second one needs.

    Args:
        data: folder of phantoms that several chains share; the first chain makes them.
    """
    folder.mkdir(parents=True)
    (folder / "data").symlink_to(data)
    for stage in stages:
        run_to_end("train", train_overrides(stage, *more), folder)
        if stage == "aekl" and stages[-1] != "aekl":
            run_to_end("encode_latents", [*SETTINGS, *more], folder)


def copy_runs(trained: Path, folder: Path, *removed: str) -> str:
    """Copy the runs of `trained` to `folder`, without the stages or folders `removed`.

    Returns:
        The override with which the copy reads the scans of `trained`.
    """
    shutil.copytree(trained / "runs", folder / "runs")
    for name in removed:
        shutil.rmtree(folder / "runs/smoke" / name, ignore_errors=True)
    return f"paths.data={trained / 'data'}"
