"""`ldae forecast`: a scan as it is expected to be some years later."""

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from ldae.commands.options import (
    ModelOptions,
    check_folder_path,
    load_model,
    model_options,
    output_option,
    parse_numbers,
    preprocess_options,
    scans_argument,
    seed_option,
    steps_option,
)
from ldae.commands.results import Results
from ldae.utils.errors import UserError

if TYPE_CHECKING:
    from ldae.editing.scan_forecast import ScanForecast

log = logging.getLogger(__name__)

COLUMN = "What else is known about the scan, such as --column diagnosis=AD; may be repeated. Default: what is usual."
DRAWS = "Random draws for the map of the standard deviation; 0: no map. Each takes as long as an image."


@click.command()
@scans_argument("SCAN", count=1)
@click.option(
    "--years", default="1,2,5", show_default=True, metavar="A,B,...", help="How many years ahead, an image each."
)
@click.option("--age", type=click.FloatRange(0, 130), help="At the scan, in years; most models need it.")
@click.option("--column", "columns", multiple=True, metavar="NAME=VALUE", help=COLUMN)
@output_option(
    "Folder for the images, NAME_in+2years.nii.gz, NAME_in+2years_deviation.nii.gz, ..., on the scan's grid."
)
@click.option("--draws", type=click.IntRange(0, 200), default=8, show_default=True, help=DRAWS)
@seed_option
@steps_option
@preprocess_options
@model_options
def forecast(
    paths: list[Path],
    years: str,
    age: float | None,
    columns: tuple[str, ...],
    output: Path,
    draws: int,
    seed: int,
    steps: int | None,
    force: bool,
    preprocess: bool | None,
    orientation: str | None,
    **model: Unpack[ModelOptions],
) -> None:
    """Forecast a scan: what the brain is expected to look like some years later.

    The change was learned from pairs of visits of the training subjects (evaluation=[forecast]). An image is the scan
    plus the change; its uncertainty is the standard deviation of the change in each voxel. A table on standard output
    gives the change of volumes with 95 % intervals. It is an expectation for persons like this one, not a prognosis.
    """
    from ldae.editing.scan_forecast import check_years, describe_volumes, parse_row

    ahead = parse_numbers(years, "--years", "1,2,5")
    check_years(ahead)
    given = parse_columns(columns) | ({} if age is None else {"age": age})
    check_folder_path(output)
    from ldae.scans.scan import scan_name, write_image

    stems = [f"{scan_name(paths[0])}_in+{time:g}years" for time in ahead]
    files = [output / f"{stem}.nii.gz" for stem in stems]
    maps = [output / f"{stem}_deviation.nii.gz" for stem in stems] if draws else []
    results = Results.of(paths, [*files, *maps])
    ldae = load_model(**model)
    from tqdm import tqdm

    parse_row(ldae.forecaster, given)  # before the scan is opened
    for note in ldae.forecaster.notes(ahead, given):
        log.warning("%s", note)
    scan = ldae.open(paths[0], not force, preprocess, orientation)
    found = ldae.forecast_each(scan, ahead, given, draws, seed, steps)
    for number, one in enumerate(tqdm(found, "forecast", len(ahead))):
        image = scan.edited(one.change, 0 * one.change)
        results.write(files[number], partial(write_image, image), _describe(one, given))
        if one.deviation is not None:
            results.write(
                maps[number], partial(write_image, scan.in_its_intensities(one.deviation)), {"Years": one.years}
            )
        click.echo("\t".join(filter(None, (f"{one.years:g} years", describe_volumes(one.volumes)))))
    click.echo(output)


def parse_columns(texts: tuple[str, ...]) -> dict[str, str | float]:
    """The values that --column gives.

    Raises:
        UserError: one is not NAME=VALUE.
    """
    found: dict[str, str | float] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not (name and sign and value):
            raise UserError(f"--column {text!r}: give NAME=VALUE, as in diagnosis=AD")
        found[name] = value
    return found


def _describe(one: "ScanForecast", given: dict[str, str | float]) -> dict[str, str | float | None]:
    """How an image was made, for the JSON file beside it."""
    made: dict[str, str | float | None] = {"Years": one.years}
    made |= {f"Given_{name}": value for name, value in given.items()}
    for name, (value, low, high) in one.volumes.items():
        made |= {f"{name}_ratio": value, f"{name}_ratio_low": low, f"{name}_ratio_high": high}
    return made
