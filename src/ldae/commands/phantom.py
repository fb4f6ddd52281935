"""`ldae phantom`: a synthetic cohort."""

from pathlib import Path

import click

from ldae.commands.options import output_option
from ldae.data.phantom import SHAPE, SPACING
from ldae.utils.errors import UserError


@click.command()
@click.option("-n", "--subjects", default=300, show_default=True, type=click.IntRange(1), help="Number of subjects.")
@click.option("--seed", default=7, show_default=True, help="Seed; the same seed gives the same cohort.")
@output_option("Folder for the NIfTIs and scans.csv.")
@click.option("--spacing", default=SPACING, show_default=True, type=click.FloatRange(0.5, 20), help="Voxel size in mm.")
@click.option("--shape", default=",".join(map(str, SHAPE)), show_default=True, help="Voxels along X,Y,Z.")
@click.option("--months", metavar="M,N,...", help="Of every subject's visits; default: one to four within 24 months.")
@click.option("-j", "--workers", default=None, type=click.IntRange(1), help="Processes; default: one per core.")
def phantom(
    subjects: int, seed: int, output: Path, spacing: float, shape: str, months: str | None, workers: int | None
) -> None:
    """Make a synthetic cohort of brain phantoms: T1w NIfTIs, label maps and a table with the true volumes."""
    from ldae.data.phantom import make_cohort

    visits = None if months is None else _parse_months(months)
    table = make_cohort(output, subjects, seed, spacing, _parse_shape(shape), workers=workers, months=visits)
    click.echo(table)


def _parse_months(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--months {text!r}: give whole numbers separated by commas, as in 0,12,36,72") from None


def _parse_shape(text: str) -> tuple[int, int, int]:
    try:
        x, y, z = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--shape {text!r}: give three whole numbers separated by commas, as in 32,40,32") from None
    return x, y, z
