"""Scripts as a user would run them, each in a process of its own, forked from one that has the slow imports behind it.

torch and MONAI take seconds to import; a suite that starts some sixty scripts would spend most of its time on that.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What the scripts need, imported once.
PRELOAD = [
    "hydra", "monai.networks.nets", "torch.utils.tensorboard", "matplotlib.pyplot", "tqdm", "sklearn", "joblib",
    "accelerate", "ldae.experiment", "ldae.training.trainer", "ldae.stages.aekl", "ldae.stages.repr",
    "ldae.data.phantom", "ldae.evaluation.run",
]  # fmt: skip


def start_process(target, *arguments) -> BaseProcess:
    """A process that calls `target`, which must be importable, with `arguments`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def enter_folder(folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    """Make this process one that was started in `folder`, its streams going to the files `out` and `err`."""
    os.environ |= environment
    os.chdir(folder)
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)


def _execute(path: Path, arguments: tuple[str, ...], folder: Path, environment: dict, out: Path, err: Path) -> None:
    enter_folder(folder, environment, out, err)
    sys.argv = [str(path), *arguments]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        threading._shutdown()  # as an interpreter does at its end, before all else: joblib's idle workers end by it


def run_script(
    name: str | Path, *arguments: str, cwd: Path, check: bool = True, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run train.py, encode_latents.py or evaluate.py by its name, or any file by its path, to its end.

    Raises AssertionError where `check` is asked for and the exit status is not 0.
    """
    path = name if isinstance(name, Path) else ROOT / f"{name}.py"
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = start_process(_execute, path, arguments, cwd, environment or {}, out, err)
        process.join(600)
        if process.exitcode is None:
            process.kill()
            process.join()
        said = [file.read_text(errors="replace") if file.exists() else "" for file in (out, err)]
    if check and process.exitcode != 0:
        raise AssertionError(f"{path.name} {arguments} exited with {process.exitcode}:\n{said[1][-4000:]}")
    return subprocess.CompletedProcess([str(path), *arguments], process.exitcode, *said)
