"""Options that commands share, and how they become a model and scans."""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ldae.utils.errors import UserError

if TYPE_CHECKING:
    from ldae.pipeline import LDAE

INPUT = "A scan, one 3-D volume: .nii, .nii.gz, .mgz. The same as naming it without -i."
PATH = click.Path(path_type=Path)
PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def _together(*decorators: Callable) -> Callable:
    def decorate(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


model_options = _together(
    click.option("--run", metavar="NAME", help="The model: a run below --runs."),
    click.option("--runs", type=PATH, default="runs", show_default=True, help="Folder of runs."),
    click.option("--bundle", type=PATH, metavar="DIR", help="The model: a folder that `ldae export` wrote."),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one."),
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default=PRECISIONS[0],
        show_default=True,
        help="Of the networks; auto: bfloat16 on a GPU that computes in it, otherwise float32.",
    ),
)
steps_option = click.option(
    "--steps", type=click.IntRange(1), help="Of inversion and of decoding each; default: the model's."
)
unlike_options = _together(
    click.option(
        "--preprocess/--no-preprocess",
        default=None,
        help="Make a scan as the training scans were made, or never. Default: where it is unlike them.",
    ),
    click.option(
        "--force",
        is_flag=True,
        help="Take scans unlike the training scans as they are. What comes out then means little.",
    ),
)
seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Of the random codes.")


def scans_argument(names: str) -> Callable:
    """Scans as arguments, or each after an -i."""
    return _together(
        click.argument("scans", metavar=names, nargs=-1, type=PATH),
        click.option("-i", "--input", "inputs", multiple=True, type=PATH, metavar="SCAN", help=INPUT),
    )


def output_option(what: str) -> Callable:
    """Where results go."""
    return click.option("-o", "--output", required=True, type=PATH, help=what)


def expand_scans(scans: Sequence[Path], inputs: Sequence[Path], count: int | None = None) -> list[Path]:
    """The scans that were named, of which `count` are due (None: any number).

    Raises:
        UserError: there are more or fewer.
    """
    found = [*scans, *inputs]
    due = {None: "at least one scan is", 1: "one scan is", 2: "two scans are"}[count]
    if not found or (count is not None and len(found) != count):
        raise UserError(f"{len(found)} scans were given where {due} needed")
    return found


def load_model(
    run: str | None, runs: Path, bundle: Path | None, device: str | None, precision: str, **options: Any
) -> "LDAE":
    """The model that --run or --bundle names, in the precision that --precision asks for.

    Raises:
        UserError: both or neither are given, or see LDAE.load; or there is no such device, or it lacks the precision.
    """
    if (run is None) == (bundle is None):
        raise UserError("name one model: --run NAME or --bundle DIR")
    from ldae.bundle.description import DESCRIPTION
    from ldae.pipeline import LDAE
    from ldae.training.precision import console_dtype, set_up_backends

    if bundle is not None and not (bundle / DESCRIPTION).is_file():
        raise UserError(f"{bundle} is no bundle: it has no {DESCRIPTION}; for a run give --run NAME --runs DIR")
    _check_device(device)
    set_up_backends()
    dtype = console_dtype(precision, device)
    return LDAE.load(bundle if bundle is not None else run, runs=runs, device=device, dtype=dtype, **options)


def _check_device(name: str | None) -> None:
    if name is None:
        return
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: it is not there ({reason}); leave it out to use what is") from error


def numbers(text: str, option: str, example: str) -> list[float]:
    """Numbers with commas between them.

    Raises:
        UserError: something else.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UserError(f"{option} {text!r}: numbers with commas are needed, as in {example}")
    return found


def image_path(path: Path, scan: Path) -> Path:
    """`path`, if a NIfTI can be written there; said before any work.

    Raises:
        UserError: its name does not end as a NIfTI's, it is `scan` itself, or nothing can be written there.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"-o {path}: a name ending in .nii.gz or .nii is needed")
    if path.is_dir():
        raise UserError(f"-o {path}: a file is needed, and this is a folder")
    if path.exists() and scan.exists() and path.samefile(scan):
        raise UserError(f"-o {path}: that is the scan itself: choose another name")
    _ready(path.parent, path)
    return path


def table_path(path: Path) -> Path:
    """`path`, if a table can be written there; said before any work.

    Raises:
        UserError: it is a folder, or nothing can be written there.
    """
    if path.is_dir():
        raise UserError(f"-o {path}: a file is needed, such as y.csv")
    _ready(path.parent, path)
    return path


def folder_path(path: Path) -> Path:
    """`path`, if it is or can become a folder that can be written to; said before any work.

    Raises:
        UserError: a file is in the way, it is meant as one, or nothing can be written there.
    """
    if path.is_file() or path.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"-o {path}: a folder is needed, several images are written")
    _ready(path, path)
    return path


def _ready(folder: Path, given: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        blocked = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "a file is in the way" if blocked else error.strerror
        raise UserError(f"-o {given}: nothing can be written there ({reason})") from error


def said(value: float) -> str:
    """A number in a file's name, with its sign: +0.5, -2."""
    return f"{value:+g}"
