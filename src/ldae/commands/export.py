"""`ldae export`: a run as a folder to share."""

from pathlib import Path

import click

from ldae.commands.options import PATH, output_option
from ldae.utils.errors import UserError


@click.command()
@click.argument("run", metavar="RUN", required=False)
@click.option("-i", "--input", "named", metavar="RUN", help="The run, likewise.")
@click.option("--runs", type=PATH, default="runs", show_default=True, help="Folder of runs, where RUN is a name.")
@output_option("The bundle's folder.")
def export(run: str | None, named: str | None, runs: Path, output: Path) -> None:
    """Write a run as a bundle, which --bundle and LDAE.load open anywhere.

    It holds the networks (safetensors), their configs, the probes and directions that evaluate.py left, and README.md,
    a model card with data, metrics, intended use and limits. RUN is a name below --runs, or a path.
    """
    if (run is None) == (named is None):
        raise UserError("name one run, as in `ldae export demo -o bundle`")
    if output.is_file():
        raise UserError(f"-o {output}: a folder is needed")
    from ldae.bundle.bundle import Bundle

    click.echo(Bundle.find(run or named, runs).save(output))
