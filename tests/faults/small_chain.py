"""What the victims do: a stage at smoke size, as train.py runs it, in a process forked with everything imported."""

import logging
import os
import shutil
import signal
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from omegaconf import DictConfig

from ldae.config import compose_config
from ldae.experiment import encode, evaluate, train
from ldae.utils.entrypoint import one_line_errors

from . import scripts

STAGES = ("aekl", "pretrain", "repr")
# The smallest networks that have every part: what is killed here is the loop, and 50 kills are to take minutes.
SMALL = (
    "data.shape=[8,8,8]", "model.autoencoder.channels=[8,8]", "model.autoencoder.groups=4",
    "model.autoencoder.latent_channels=4", "model.unet.base=8", "model.unet.groups=4", "model.unet.residual_blocks=1",
    "model.discriminator.channels=4", "model.discriminator.num_layers_d=1", "model.estimator.modes=2",
    "model.encoder.dim=16", "model.encoder.backbone.widths=[4,8]", "model.encoder.backbone.out_channels=8",
)  # fmt: skip
# Saves, validations, previews and logs at different steps; dropout, accumulation and the discriminator at small_chain.
SETTINGS = (
    "experiment=smoke", *SMALL, "trainer.max_steps=8", "trainer.batch_size=1", "trainer.accumulate=2",
    "trainer.log_every=1", "trainer.validate_every=3", "trainer.preview_every=4", "trainer.checkpoint_every=2",
    "trainer.validation_scans=1", "data.phantom.subjects=8", "data.workers=1", "stage.sampler.steps=2",
)  # fmt: skip


def train_overrides(stage: str, *more: str) -> list[str]:
    """Of train.py for `stage`."""
    own = [text for text in SETTINGS if stage == "repr" or not text.startswith("stage.")]
    return [*own, f"stage={stage}", *more]


def run_in_folder(script: str, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    """The body of a process: one of the three scripts in `folder`, its output in `folder`/log."""
    scripts.enter_folder(folder, environment, Path("log"), Path("log"))
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    with one_line_errors():
        {"train": train, "encode_latents": encode, "evaluate": evaluate}[script](compose_config(script, arguments))


def start_script(
    script: str, arguments: list[str], folder: Path, environment: dict[str, str] | None = None
) -> BaseProcess:
    """A process that runs a script, with more variables in its environment."""
    return scripts.start_process(run_in_folder, script, arguments, folder, environment or {})


def processor_seconds(process: BaseProcess) -> float:
    """Seconds of processor time that a process has used; 0 when it is gone. Waiting in a queue costs none."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # of user and system, see proc(5)


def run_to_end(script: str, arguments: list[str], folder: Path, limit: float = 1800.0) -> float:
    """Run a script to its end; its seconds of processor time."""
    end, used = time.monotonic() + limit, 0.0
    process = start_script(script, arguments, folder)
    while process.is_alive() and time.monotonic() < end:
        used = max(used, processor_seconds(process))
        process.join(0.02)
    if process.exitcode != 0:
        process.kill()
        raise AssertionError(f"{script} {arguments}: exit {process.exitcode}\n{read_log(folder)[-3000:]}")
    return used


def run_distributed(script: str, arguments: list[str], folder: Path, count: int, limit: float = 900.0) -> None:
    """Run a script to its end in `count` processes, as `accelerate launch` or srun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    processes = [
        start_script(
            script, arguments, folder, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else None
        )
        for rank in range(count)
    ]
    for process in processes:
        process.join(limit)
    codes = [process.exitcode for process in processes]
    if codes != [0] * count:
        for process in processes:
            process.kill()
        raise AssertionError(f"{script} {arguments}: exits {codes}\n{read_log(folder)[-3000:]}")


def read_log(folder: Path) -> str:
    """What the processes in `folder` have said so far."""
    path = folder / "log"
    return path.read_text(errors="replace") if path.exists() else ""


def train_chain(folder: Path, stages: tuple[str, ...] = STAGES, *more: str) -> None:
    """Run `stages` in `folder`, never disturbed."""
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        run_to_end("train", train_overrides(stage, *more), folder)
        if stage == "aekl" and stages[-1] != "aekl":
            run_to_end("encode_latents", [*(text for text in SETTINGS if not text.startswith("stage.")), *more], folder)


def copy_runs(whole: Path, place: Path, *removed: str) -> str:
    """Copy what `whole` has trained to `place`, without some of it; the override by which it reads the same scans."""
    shutil.copytree(whole / "runs", place / "runs")
    for name in removed:
        shutil.rmtree(place / "runs/smoke" / name, ignore_errors=True)
    return f"paths.data={whole / 'data'}"


def send_signal(process: BaseProcess, number: int = signal.SIGKILL) -> None:
    """Send a signal."""
    os.kill(process.pid, number)
