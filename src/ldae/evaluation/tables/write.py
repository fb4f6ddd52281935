"""Writes all tables of a run to runs/NAME/evaluation/tables."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from ldae.evaluation.tables.layout import PAPER, Row, Table
from ldae.evaluation.tables.other import build_forecast, build_generation, build_interpolation, build_speed
from ldae.evaluation.tables.probes import build_probes
from ldae.evaluation.tables.reconstruction import build_reconstruction
from ldae.evaluation.tables.render import to_csv, to_latex, to_latex_document, to_markdown
from ldae.evaluation.tables.sources import Sources
from ldae.utils.files import write_text

FOLDER = "tables"  # in runs/NAME/evaluation


def build_tables(sources: Sources) -> list[Table]:
    """The tables in the paper's order."""
    tables = [
        build_reconstruction(sources),
        *build_probes(sources),
        build_interpolation(sources),
        build_forecast(sources),
        build_generation(sources),
        build_speed(sources),
    ]
    return [replace(table, rows=merge_missing(table.rows)) for table in tables]


def merge_missing(rows: Sequence[Row]) -> list[Row]:
    """The rows, with those one after the other that one command measures as one."""
    merged = []
    for (is_missing, origin, command), group in groupby(rows, lambda row: (row.is_missing, row.origin, row.command)):
        same = list(group)
        if is_missing and len(same) > 1:
            same = [Row(f"{same[0].label}, and {len(same) - 1} more rows", same[0].cells, origin, command)]
        merged += same
    return merged


def write_tables(folder: Path) -> Path:
    """Write the tables of the run in `folder`, runs/NAME, from what is stored; returns the page of all tables.

    Raises:
        UserError: there is no such run, or nothing of it was evaluated. Nothing is written then.
    """
    sources = Sources.read(folder)
    tables, source, out = build_tables(sources), describe(sources), folder / "evaluation" / FOLDER
    contents = {
        "tables.md": to_markdown(tables, f"Tables of the run {sources.run.name}", source),
        "tables.tex": to_latex_document(tables, source),
        **{f"{table.key}.tex": to_latex(table, source) for table in tables},
        **{f"{table.key}.csv": to_csv(table) for table in tables},
    }
    for name, text in contents.items():
        write_text(out / name, text)
    for leftover in _find_leftovers(out, contents.keys()):
        leftover.unlink()
    return out / "tables.md"


def describe(sources: Sources) -> str:
    """What the tables were made of."""
    weights = ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(sources.run.weights.items()))
    beside = f", and of the runs {', '.join(each.name for each in sources.siblings)}" if sources.siblings else ""
    return (
        f"From metrics.json of {sources.run.name} (SHA-256 {sources.identity[:12]}; weights: {weights}){beside}. "
        f"Rows in italics, '{PAPER}', are the figures of the paper (arXiv 2504.08635). They are of another cohort, of "
        "other people and another voxel size: none of our rows is better or worse than them."
    )


def _find_leftovers(out: Path, names: Sequence[str]) -> list[Path]:
    """Tables of an earlier call that are no longer made."""
    return [path for path in out.iterdir() if path.suffix in (".md", ".tex", ".csv") and path.name not in names]
