"""`ldae tables`: the paper's tables of a finished run."""

from pathlib import Path

import click

from ldae.commands.options import PATH


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--runs", type=PATH, default="runs", show_default=True, help="Folder of runs, if RUN is a name.")
def tables(run: str, runs: Path) -> None:
    """Write the paper's tables of RUN as Markdown, LaTeX and CSV, to runs/RUN/evaluation/tables.

    They are made of what evaluate.py and the bench have stored, of RUN and of runs beside it with the same split.
    Nothing is computed; what is missing is named with the command that measures it.
    """
    from ldae.evaluation.tables.write import write_tables

    folder = Path(run) if Path(run).is_dir() and len(Path(run).parts) > 1 else runs / run
    click.echo(write_tables(folder))
