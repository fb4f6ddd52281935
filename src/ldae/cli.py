"""The console script `ldae`, for people with scans rather than experiments.

Imports stay inside the commands, so that --help is quick.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import click

from ldae.errors import UserError

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class _Group(click.Group):
    """A user's mistake ends in one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"ldae: {error}", err=True)
            sys.exit(2)


@click.group(cls=_Group, context_settings=SETTINGS)
@click.version_option(package_name="ldae")
def main() -> None:
    """Latent Diffusion Autoencoders for 3D brain MRI."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


@main.command()
@click.option("-n", "--subjects", default=300, show_default=True, type=click.IntRange(1), help="Number of subjects.")
@click.option("--seed", default=7, show_default=True, help="The cohort is a function of its seed.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder for NIfTIs and scans.csv.")
@click.option("--spacing", default=4.5, show_default=True, type=click.FloatRange(0.5, 20), help="Voxel size in mm.")
@click.option("--shape", default="40,48,40", show_default=True, help="Voxels along X,Y,Z.")
@click.option("-j", "--workers", default=None, type=click.IntRange(1), help="Processes; default: one a core.")
def phantom(subjects: int, seed: int, output: Path, spacing: float, shape: str, workers: int | None) -> None:
    """Make a cohort of brain phantoms: T1w NIfTIs, label maps and a table with the true volumes."""
    from ldae.data.phantom import make_cohort

    table = make_cohort(output, subjects, seed, spacing, _triple(shape), workers=workers)
    click.echo(table)


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--bias", help="Bias field: n4, none.")
@click.option("--brain", help="Brain extraction: deepbet, stripped (it is done already), none.")
@click.option("--registration", help="To the template: rigid, affine, syn, none (it is done already).")
@click.option("--intensity", help="Normalisation: none, white_matter, tissues.")
@click.option("--regions", help="What is counted in label maps: dlmuse, labels.")
@click.option("--spacing", help="Voxel size in mm of the result, or null for the template's; 1.5 by default.")
@click.option("--labels", type=click.Path(path_type=Path), help="Folder of label maps *_dseg.nii.gz in native space.")
@click.option("--participants", type=click.Path(path_type=Path), help="Default: participants.tsv in SOURCE.")
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


def _triple(text: str) -> tuple[int, int, int]:
    try:
        x, y, z = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--shape {text!r}: three whole numbers with commas are needed, as in 40,48,40") from None
    return x, y, z


@main.command("import-official")
@click.option("--autoencoder", required=True, type=click.Path(path_type=Path), help="autoencoderkl.pth")
@click.option("--encoder", required=True, type=click.Path(path_type=Path), help="encoder.pth")
@click.option("--decoder", required=True, type=click.Path(path_type=Path), help="decoder.pth")
@click.option("--unet", type=click.Path(path_type=Path), help="Training checkpoint with the U-Net under `ema_unet.`.")
@click.option("--probe", type=click.Path(path_type=Path), help="The linear AD/CN probe.")
@click.option("--mean", type=click.Path(path_type=Path), help="Mean of y that the probe was fitted with.")
@click.option("--std", type=click.Path(path_type=Path), help="Standard deviation of y likewise.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle's folder.")
def import_official(**paths: Path | None) -> None:
    """Turn the released LDAE checkpoints into a bundle that LDAE.load opens."""
    from ldae.official_bundle import import_official as convert

    out = paths.pop("output")
    convert(**paths, out=out)
    click.echo(out)


if __name__ == "__main__":
    main()
