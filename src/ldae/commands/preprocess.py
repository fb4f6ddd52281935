"""`ldae preprocess`: raw scans in, scans that models take out."""

from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--bias", help="Bias field: n4, none.")
@click.option("--brain", help="Brain extraction: deepbet, stripped (it is done already), none.")
@click.option("--registration", help="To the template: rigid, affine, syn, none (it is done already).")
@click.option("--intensity", help="Normalisation: none, white_matter, tissues.")
@click.option("--regions", help="What is counted in label maps: dlmuse, labels.")
@click.option("--spacing", help="Voxel size in mm of the result, or null for the template's; 1.5 by default.")
@click.option("--labels", type=click.Path(path_type=Path), help="Folder of label maps *_dseg.nii.gz in native space.")
@click.option(
    "--participants",
    type=click.Path(path_type=Path),
    help="Default: participants.tsv in SOURCE. For a CAPS tree or a CSV: that of the BIDS dataset.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any value of conf/preprocess.")
@click.option("-j", "--workers", default=None, type=click.IntRange(1), help="Processes; default: one a core.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads a process.")
def preprocess(source: Path, output: Path, overrides: tuple[str, ...], **options: Any) -> None:
    """Turn raw T1w scans into scans that models take, a table, and a page for quality control.

    SOURCE is a BIDS dataset, a Clinica CAPS tree, or a CSV with a column `path`. OUTPUT becomes BIDS derivatives with
    scans.csv, rejected.csv (what was set aside, and why) and qc.html. The same command again goes on where it stopped.
    """
    from ldae.preprocess import preprocess as run

    groups = ("bias", "brain", "registration", "intensity", "regions")
    chosen = [f"preprocess/{name}={options[name]}" for name in groups if options[name]]
    chosen += [f"preprocess.spacing={options['spacing']}"] if options["spacing"] else []
    others = {name: options[name] for name in ("labels", "participants", "workers", "threads")}
    run(source, output, [*chosen, *overrides], **others)
    click.echo(output / "scans.csv")
