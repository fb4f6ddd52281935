"""Runs train.py, encode_latents.py and evaluate.py as a user would, each in a process of its own.

The processes are forked from a server that has already imported torch and MONAI: importing them takes seconds, and the
tests start some sixty scripts.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 600.0  # seconds
# Modules that the scripts need, imported once by the server.
PRELOAD = [
    "hydra", "monai.networks.nets", "torch.utils.tensorboard", "matplotlib.pyplot", "tqdm", "sklearn", "joblib",
    "accelerate", "ldae.experiment", "ldae.training.trainer", "ldae.stages.aekl", "ldae.stages.repr",
    "ldae.data.phantom", "ldae.evaluation.run",
]  # fmt: skip


def start_process(target: Callable, *arguments) -> BaseProcess:
    """Start a process that calls `target`, which must be importable by its name, with `arguments`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def enter_folder(folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    """Set this process's working folder and further environment variables, and append its two streams to files."""
    os.environ |= environment
    os.chdir(folder)
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)


def _execute(path: Path, arguments: tuple[str, ...], folder: Path, environment: dict, out: Path, err: Path) -> None:
    enter_folder(folder, environment, out, err)
    sys.argv = [str(path), *arguments]
    runpy.run_path(str(path), run_name="__main__")


def run_script(
    name: str | Path, *arguments: str, cwd: Path, check: bool = True, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run a script to its end.

    Args:
        name: "train", "encode_latents" or "evaluate", or the path of a Python file.
        cwd: the working folder.
        check: whether an exit status other than 0 is an error.
        environment: variables added to the environment.

    Raises:
        AssertionError: the script failed, or did not end within `TIMEOUT`, and `check` is true.
    """
    path = name if isinstance(name, Path) else ROOT / f"{name}.py"
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start_process(_execute, path, arguments, cwd, environment or {}, out, err)
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            process.join()
        printed = [file.read_text(errors="replace") if file.exists() else "" for file in (out, err)]
    if check and process.exitcode != 0:
        raise AssertionError(f"{path.name} {arguments} exited with {process.exitcode}:\n{printed[1][-4000:]}")
    return subprocess.CompletedProcess([str(path), *arguments], process.exitcode, *printed)
