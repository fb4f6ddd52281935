"""Proves that no command of README and docs changes a byte if one of its arguments is mistyped.

Each command runs in a folder with a user's table, scans, a finished run and a bundle, once for each argument with a
letter of its name changed and once with a letter of its value changed. It must end with a status other than 0 and a
message that names what was mistyped, and afterwards all files must have the same checksums.
"""

import hashlib
import importlib.util
import io
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from glob import glob
from pathlib import Path

import click
import pandas as pd
import pytest
from accelerate.state import AcceleratorState
from click.testing import CliRunner

from faults.scripts import run_script as start_script
from ldae.bench.__main__ import hydra_arguments
from ldae.bench.__main__ import main as bench
from ldae.bench.gpu_check.__main__ import main as gpu_check
from ldae.bundle.bundle import Bundle
from ldae.cli import main as console
from ldae.editing.forecast_file import write_forecaster
from ldae.preprocessing.check import main as preprocessing_check
from ldae.utils import entrypoint
from pages import PAGES, ROOT, STAGE_OF, commands
from small_datasets import brain
from small_forecaster import a_forecaster

pytestmark = pytest.mark.usefixtures("no_worker_processes")

SCRIPTS = ("train", "encode_latents", "evaluate")
RUNS = ("demo", "mine")  # names that the pages give to runs
# In place of the pages' sizes and cohorts those of the finished run, with which the correct command works.
SMALLER = {
    "experiment=demo": "experiment=smoke",
    "data=ixi": "data=table",
    "model=small": "model=tiny",
    "model/autoencoder=identity": "model/autoencoder=tiny",
    "name=voxels": "name=mine",
}
GRID = ("data.shape=[24,24,24]", "data.spacing=9.0")
WITHOUT_ANTS = ("--bias", "none", "--brain", "stripped", "--registration", "none", "-j", "1")
WITHOUT_ANTS += ("--spacing", "4", "--set", 'preprocess.columns.age=["Age (years)"]')
PLACEHOLDERS = re.compile(r"NAME|=\.\.\.")
OUTPUTS = ("-o", "--out", "--output", "--name")


@dataclass
class Command:
    """A command in which one argument is mistyped.

    Attributes:
        program: "ldae", a script, "make" or the name of a module.
        words: its arguments.
        mistyped: the word in which a letter was changed, as it is and as it should be.
    """

    program: str
    words: list[str]
    mistyped: tuple[str, str] = ("", "")

    def __str__(self) -> str:
        return shlex.join([self.program, *self.words])


def read_command(words: list[str]) -> Iterator[Command]:
    """The programs that a command of a page starts: for `make` also the one that gets ARGS."""
    script = next((index for index, word in enumerate(words) if word.endswith(".py")), None)
    if script is not None:
        program = Path(words[script]).stem
        if program in SCRIPTS:
            yield Command(program, words[script + 1 :])
    elif words[0] == "make":
        yield Command("make", words[1:])
        yield from started_by_make(words[1:])
    elif words[:2] == ["python", "-m"]:
        yield Command(words[2], words[3:])
    elif words[0] == "ldae" and words[1:2] and words[1] in console.commands and len(words) > 2:
        yield Command("ldae", words[1:])


def started_by_make(words: list[str]) -> Iterator[Command]:
    target = next(word for word in words if "=" not in word)
    given = next((shlex.split(word.removeprefix("ARGS=")) for word in words if word.startswith("ARGS=")), [])
    if target in STAGE_OF:
        yield Command("train", [f"stage={STAGE_OF[target]}", *given])
    elif target in ("encode", "evaluate"):
        yield Command({"encode": "encode_latents"}.get(target, target), given)
    elif target == "bench":
        yield Command("ldae.bench", given)
    elif target == "gpu-check":
        budget = [word.removeprefix("BUDGET=") for word in words if word.startswith("BUDGET=")]
        yield Command("ldae.bench.gpu_check", [*(["--budget", *budget] if budget else []), *given])


def change_letter(text: str, end: int | None = None) -> tuple[str, tuple[str, str]]:
    """The last letter or digit before `end` becomes a letter that no number has.

    Returns:
        The new text, and the word that has the new letter, as it is and as it should be.
    """
    at = max(index for index, letter in enumerate(text[:end]) if letter.isalnum())
    changed = text[:at] + ("q" if text[at] in "xX" else "x") + text[at + 1 :]
    return changed, tuple(re.search(r"\w+$", version[: at + 1])[0] for version in (changed, text))


def before_extensions(value: str) -> int:
    """Length of a path without its extensions, and of any other value."""
    return re.search(r"(\.[a-z]\w*)*$", value).start() or len(value)


def mistyped(command: Command) -> Iterator[Command]:
    """Each argument of a command once with another name and once with another value, if it has them."""
    for index, word in enumerate(command.words):
        name, sign, value = word.partition("=")
        if sign or word.startswith(("-", "~")):
            changed, wrong = change_letter(name)
            yield replace_word(command, index, changed + sign + value, wrong)
        if sign:
            name, value = name + sign, value
        elif not word.startswith(("-", "~")):
            name, value = "", word
        is_shell_variable = command.program == "make" and sign  # its value is walked as arguments of the program
        if re.search(r"\w", value) and not is_free(command, index) and not is_shell_variable:
            changed, wrong = change_letter(value, before_extensions(value))
            yield replace_word(command, index, name + changed, wrong)


def replace_word(command: Command, index: int, word: str, wrong: tuple[str, str]) -> Command:
    return Command(command.program, [*command.words[:index], word, *command.words[index + 1 :]], wrong)


def is_free(command: Command, index: int) -> bool:
    """Whether any value may be right: the name of an output or of a new run, and settings of the user's cluster."""
    words = command.words
    if words[index].startswith("launcher."):
        return True
    if command.program == "ldae" and words[0] == "preprocess" and index == 2:
        return True
    begins = {"stage=aekl", "stage=supervised"} & set(words) or (
        command.program == "encode_latents" and "model/autoencoder=identity" in words
    )
    return bool(words[index].startswith("name=") and begins) or words[index - 1] in OUTPUTS


@cache
def all_commands() -> dict[str, Command]:
    """The commands of all pages by their text, each once."""
    found = [command for page in PAGES for words in commands(page) for command in read_command(words)]
    return {str(command): command for command in found if command.words and not PLACEHOLDERS.search(str(command))}


def run_script(name: str, words: list[str]) -> None:
    words = [SMALLER.get(word, word) for word in words]
    if not any(word.startswith("experiment=") for word in words):
        words.append("experiment=smoke")
    if any(word in ("data=table", "data.table=other.csv", "data.table=fresh/scans.csv") for word in words):
        words = [*words, *GRID]
    call_hydra(load_script(name), [str(ROOT / f"{name}.py"), *words])


@cache
def load_script(name: str) -> Callable:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def call_hydra(main: Callable, arguments: list[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        patch.setenv("HYDRA_FULL_ERROR", "0")  # set by run_script
        patch.setattr(logging.root, "handlers", [])  # those of earlier commands write to their streams
        patch.setattr(logging.root, "level", logging.root.level)
        entrypoint.run_script(main)


def call_click(main: click.Command, words: list[str]) -> None:
    result = CliRunner().invoke(main, words)
    sys.stderr.write(result.output)
    if result.exc_info and not isinstance(result.exception, SystemExit):
        sys.stderr.write("".join(traceback.format_exception(*result.exc_info)))
    sys.exit(result.exit_code)


def expand(word: str) -> list[str]:
    """A word as the shell hands it over: a pattern as the files that match, if there are any."""
    return sorted(glob(word)) or [word]


def call(command: Command) -> None:
    """Run a command in this process, or `make` without running what it would start."""
    if command.program in SCRIPTS:
        run_script(command.program, command.words)
    elif command.program == "ldae.bench":
        call_hydra(bench, ["bench", *hydra_arguments(command.words)])
    elif command.program == "ldae.bench.gpu_check":
        gpu_check(command.words)
    elif command.program == "ldae.preprocessing.check":
        call_click(preprocessing_check, command.words)
    elif command.program == "ldae":
        call_click(console, [path for word in command.words for path in expand(word)])
    elif command.program == "make":
        process = subprocess.run(["make", "-n", "-C", ROOT, *command.words], capture_output=True, text=True)
        sys.stderr.write(process.stderr)
        sys.exit(process.returncode)


def outcome(command: Command) -> tuple[int, str]:
    """Exit status of a command, and what it printed."""
    stream = io.StringIO()
    with redirect_stdout(stream), redirect_stderr(stream):
        try:
            call(command)
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1, stream.getvalue()
    return 0, stream.getvalue()


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, and an empty text for every folder."""
    found = {}
    for path in folder.rglob("*"):
        state = path.stat()
        found[str(path.relative_to(folder))] = digest(path, state.st_ino, state.st_ctime_ns) if path.is_file() else ""
    return found


@cache
def digest(path: Path, inode: int, changed: int) -> str:
    """SHA-256 of a file. It is computed again only if the file system has noted a change."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def place(smoke: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user has it: tables, scans, finished runs, a bundle and files of other programs."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(smoke / "data", folder / "data")
    shutil.copytree(smoke / "runs" / "smoke", folder / "runs" / RUNS[0])
    start_script("train", "experiment=smoke", "stage=prior", f"name={RUNS[0]}", cwd=folder)
    run = folder / "runs" / RUNS[0]
    forecaster = a_forecaster(categories=("AD", "CN", "MCI"))
    write_forecaster(run / "evaluation/forecast.safetensors", forecaster, Bundle.from_run(run).weights_hash)
    for name in RUNS[1:]:
        shutil.copytree(folder / "runs" / RUNS[0], folder / "runs" / name)
    table = next((folder / "data").glob("phantom_*/scans.csv"))
    for name in ("scans.csv", "other.csv", "fresh/scans.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = pd.read_csv(table, dtype=str)
        rows["path"] = [os.path.relpath(table.parent / path, (folder / name).parent) for path in rows["path"]]
        rows.to_csv(folder / name, index=False)
    scans = sorted(table.parent.rglob("*_T1w.nii.gz"))
    (folder / "scans").mkdir()
    for name, scan in zip(("scan", "first", "last", "scans/a", "scans/b"), scans, strict=False):
        shutil.copy(scan, folder / f"{name}.nii.gz")
    for name in ("MY_BIDS/sub-1/anat/sub-1_T1w", "LABELS/sub-1_dseg"):
        brain().write(folder / f"{name}.nii.gz")
    (folder / "MY_BIDS/participants.tsv").write_text("participant_id\tAge (years)\tsex\nsub-1\t71\t0\n")
    for name in ("a.pth", "e.pth", "d.pth", "notes.txt", "y.csv"):
        (folder / name).write_text("a file of the user\n")
    (folder / "runs/before").mkdir()
    (folder / "runs/before/bench.json").write_text('{"encode/ms": 1.0}\n')
    runs, bundle, source, output = (str(folder / name) for name in ("runs", "bundle", "MY_BIDS", "derivatives/mine"))
    for words in (["export", "demo", "--runs", runs, "-o", bundle], ["preprocess", source, output, *WITHOUT_ANTS]):
        result = CliRunner().invoke(console, words)
        assert result.exit_code == 0, result.output
    return folder


def test_the_walk_has_the_commands_of_the_pages():
    text = list(all_commands())
    assert len(text) > 50
    for start in (
        "train stage=aekl",
        "encode_latents ",
        "evaluate ",
        "ldae preprocess",
        "ldae embed",
        "make train-aekl",
    ):
        assert any(command.startswith(start) for command in text), start


@pytest.mark.parametrize("command", all_commands().values(), ids=str)
def test_a_mistyped_argument_changes_no_byte_and_is_named(command, place, monkeypatch, tmp_path, caplog):
    monkeypatch.chdir(place)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # in which Hydra makes the folder of a sweep
    before, problems = checksums(place), []
    for wrong in mistyped(command):
        caplog.clear()
        status, printed = outcome(wrong)
        printed += "".join(caplog.messages)
        after = checksums(place)
        changed = sorted(path for path in {*before, *after} if before.get(path) != after.get(path))
        # A package that is not installed is said before anything else, and so is what the model lacks.
        named = any(word in printed for word in (*wrong.mistyped, "pip install", "without a calibration"))
        if status == 0 or changed or "Traceback" in printed or not named:
            problems.append(f"{wrong}\n  status {status}, changed {changed[:5]}, printed:\n{printed[-1500:]}")
        before = after
    assert not problems, "\n".join(problems)
