"""`ldae export`: a run as a folder to share."""

from pathlib import Path

import click

from ldae.commands.options import PATH, output_option
from ldae.utils.errors import UserError


@click.command()
@click.argument("run", metavar="RUN", required=False)
@click.option("-i", "--input", "run_option", metavar="RUN", help="The same as naming RUN without -i.")
@click.option("--runs", type=PATH, default="runs", show_default=True, help="Folder of runs, if RUN is a name.")
@output_option("Folder of the bundle.")
def export(run: str | None, run_option: str | None, runs: Path, output: Path) -> None:
    """Write a run as a bundle, a folder that --bundle and LDAE.load open anywhere.

    It contains the networks (safetensors), their configs, the probes and directions that evaluate.py stored, and
    README.md, a model card with data, metrics, intended use and limits. RUN is the name of a run in --runs, or a path.
    """
    if (run is None) == (run_option is None):
        raise UserError("name one run, as in `ldae export demo -o bundle`")
    if output.is_file():
        raise UserError(f"-o {output} is a file: give the name of a folder")
    from ldae.bundle.bundle import Bundle

    click.echo(Bundle.find(run or run_option, runs).save(output))
