"""Options that several commands share, and the checks of what they are given."""

import errno
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from ldae.utils.errors import UserError
from ldae.utils.shards import Shard

if TYPE_CHECKING:
    from ldae.pipeline import LDAE

PATH = click.Path(path_type=Path)
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
Decorator = Callable[[Callable], Callable]


def _together(*decorators: Decorator) -> Decorator:
    """Several click decorators as one."""

    def decorate(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


model_options = _together(
    click.option("--run", metavar="NAME", help="The model: a run in --runs."),
    click.option("--runs", type=PATH, default="runs", show_default=True, help="Folder of runs."),
    click.option("--bundle", type=PATH, metavar="DIR", help="The model: a folder written by `ldae export`."),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one."),
    click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default=PRECISIONS[0],
        show_default=True,
        help="Precision of the networks; auto: bfloat16 on a GPU that supports it, otherwise float32.",
    ),
)
steps_option = click.option(
    "--steps", type=click.IntRange(1), help="Number of steps of inversion and of decoding; default: the model's."
)
orientation_option = click.option(
    "--orientation",
    type=click.Choice(("RAS", "LAS")),
    help="Orientation of scans whose files state none (Analyze, codes of 0). Default: they are rejected.",
)
preprocess_options = _together(
    orientation_option,
    click.option(
        "--preprocess/--no-preprocess",
        default=None,
        help="Always or never run the training preprocessing. Default: if a scan fails the out-of-distribution check.",
    ),
    click.option(
        "--force",
        is_flag=True,
        help="Skip the out-of-distribution check. Results for scans that fail it are not meaningful.",
    ),
)
shard_option = click.option(
    "--shard",
    metavar="I/N",
    callback=lambda _context, _option, text: None if text is None else Shard.parse(text),
    help="Do part I of N of the scans, as one of N jobs that share OUTPUT. The last job writes the tables.",
)
merge_option = click.option(
    "--merge", is_flag=True, help="Only write the tables of what the jobs with --shard have done."
)
seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random noise.")


def scans_argument(names: str, count: int | None = None) -> Decorator:
    """Scans as arguments or after -i each, passed to the command as `paths`; `count` of them (None: one or more)."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(scans: tuple[Path, ...], inputs: tuple[Path, ...], **options: object) -> None:
            paths = [*scans, *inputs]
            needed = {None: "at least one scan is", 1: "one scan is", 2: "two scans are"}[count]
            if not paths or (count is not None and len(paths) != count):
                raise UserError(f"{len(paths)} scans were given where {needed} needed")
            command(paths=paths, **options)

        return _together(
            click.argument("scans", metavar=names, nargs=-1, type=PATH),
            click.option(
                "-i", "--input", "inputs", multiple=True, type=PATH, metavar="SCAN",
                help="A scan: one 3-D volume in .nii, .nii.gz or .mgz. The same as naming it without -i.",
            ),
        )(run)  # fmt: skip

    return decorate


def output_option(what: str) -> Decorator:
    """Where results are written."""
    return click.option("-o", "--output", required=True, type=PATH, help=what)


class ModelOptions(TypedDict):
    """The values of `model_options`."""

    run: str | None
    runs: Path
    bundle: Path | None
    device: str | None
    precision: str


def load_model(**options: Unpack[ModelOptions]) -> "LDAE":
    """Load the model that --run or --bundle names.

    Raises:
        UserError: both or neither are given, the device or the precision is not available, or see LDAE.load.
    """
    run, bundle, device = options["run"], options["bundle"], options["device"]
    if (run is None) == (bundle is None):
        raise UserError("name one model: --run NAME or --bundle DIR")
    from ldae.bundle.description import DESCRIPTION
    from ldae.pipeline import LDAE
    from ldae.training.precision import console_dtype, set_up_backends

    if bundle is not None and not (bundle / DESCRIPTION).is_file():
        raise UserError(f"{bundle} is no bundle: it has no {DESCRIPTION}; for a run give --run NAME --runs DIR")
    _check_device(device)
    set_up_backends()
    dtype = console_dtype(options["precision"], device)
    return LDAE.load(run if bundle is None else bundle, runs=options["runs"], device=device, dtype=dtype)


def _check_device(name: str | None) -> None:
    if name is None:
        return
    import torch

    try:
        torch.empty(0, device=name, dtype=torch.float64)  # the noise schedule needs float64, which MPS does not have
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not available ({reason}); leave it out to use what is") from error


def parse_numbers(text: str, option: str, example: str) -> list[float]:
    """Numbers separated by commas.

    Raises:
        UserError: something else.
    """
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [math.nan]
    if not all(map(math.isfinite, found)):
        raise UserError(f"{option} {text!r}: give numbers separated by commas, as in {example}")
    return found


def format_signed(value: float) -> str:
    """A number with its sign, for file names: +0.5, -2."""
    return f"{value:+g}"


def check_image_path(path: Path, scan: Path) -> None:
    """Refuse a path at which no NIfTI can be written, before any computation.

    Raises:
        UserError: its name does not end as a NIfTI's, it is the scan itself, or nothing can be written there.
    """
    if not path.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"-o {path}: give a name that ends in .nii.gz or .nii")
    if path.is_dir():
        raise UserError(f"-o {path} is a folder: give the name of a file")
    if path.exists() and scan.exists() and path.samefile(scan):
        raise UserError(f"-o {path} is the scan itself: choose another name")
    _check_writable(path.parent, path)


def check_table_path(path: Path) -> None:
    """Refuse a path at which no table can be written, before any computation.

    Raises:
        UserError: it is a folder, or nothing can be written there.
    """
    if path.is_dir():
        raise UserError(f"-o {path} is a folder: give the name of a file, such as y.csv")
    _check_writable(path.parent, path)


def check_folder_path(path: Path) -> None:
    """Refuse a path that is not and cannot become a writable folder, before any computation.

    Raises:
        UserError: it is a file, it is named like one, or nothing can be written there.
    """
    if path.is_file() or path.name.endswith((".nii", ".nii.gz")):
        raise UserError(f"-o {path}: give the name of a folder, several images are written")
    _check_writable(path, path)


def _check_writable(folder: Path, given: Path) -> None:
    """Refuse a folder that is not and cannot become writable; nothing is made yet, as the command may still fail."""
    present = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not present.is_dir():
        raise UserError(f"-o {given}: nothing can be written there (a file is in the way)")
    if not os.access(present, os.W_OK | os.X_OK):
        raise UserError(f"-o {given}: nothing can be written there ({os.strerror(errno.EACCES)})")
