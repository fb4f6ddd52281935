"""Tables as Markdown, LaTeX (booktabs) and CSV."""

import csv
import io
from collections.abc import Sequence

from ldae.evaluation.tables.layout import THEN, Column, Row, Table

NOTHING = "–"
ESCAPES = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "'": r"\textquotesingle{}", "–": "--", "[": "{[}", "]": "{]}",
}  # fmt: skip
FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
PREAMBLE = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage[utf8]{inputenc}
\usepackage{textcomp}
\usepackage{booktabs}
\usepackage{graphicx}
\usepackage[margin=2cm]{geometry}
\begin{document}
"""


def to_markdown(tables: Sequence[Table], heading: str, source: str) -> str:
    """All tables as one page."""
    return "\n\n".join([f"# {heading}", source, *(_markdown_table(table) for table in tables)]) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    lines = [line(["", "of", *(column.title for column in table.columns)]), "|---|---|" + "---|" * len(table.columns)]
    for row in table.rows:
        shown = [text or NOTHING for text in row.texts(table.columns)]
        if row.is_missing:
            shown = [_missing(row), *[""] * (len(table.columns) - 1)]
        mark = "*" if row.is_published else ""
        lines.append(line([f"{mark}{text}{mark}" if text else "" for text in (row.label, row.origin, *shown)]))
    notes = "".join(f"\n\n{note}" for note in table.notes)
    return f"## {table.title}\n\n" + "\n".join(lines) + notes


def _missing(row: Row) -> str:
    commands = THEN.join(f"`{command}`" for command in row.command.split(THEN))
    return f"not measured: {commands}" if row.command else "not measured"


def to_latex(table: Table, source: str) -> str:
    r"""One table environment, to be taken in by \input. It needs the packages booktabs, graphicx and textcomp.

    Args:
        source: written as a comment in the first line.
    """
    width = len(table.columns)
    head = " & ".join(["", "of", *(column.title for column in map(_escaped_column, table.columns))])
    lines = [
        f"% {' '.join(source.split())}", r"\begin{table}[htbp]", r"\centering", rf"\caption{{{escape(table.title)}. "
        rf"{escape(' '.join(table.notes))}}}", rf"\label{{tab:{table.key.replace('_', '-')}}}", FIT,
        rf"\begin{{tabular}}{{ll{'r' * width}}}", r"\toprule", rf"{head} \\", r"\midrule",
    ]  # fmt: skip
    previous = None
    for row in table.rows:
        if previous is not None and row.is_published != previous.is_published:
            lines.append(r"\midrule")
        lines.append(rf"{_latex_row(row, table.columns)} \\")
        previous = row
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table}"]) + "\n"


def _escaped_column(column: Column) -> Column:
    return Column(escape(column.title), column.digits)


def _latex_row(row: Row, columns: Sequence[Column]) -> str:
    start = [rf"\textit{{{escape(text)}}}" if row.is_published else escape(text) for text in (row.label, row.origin)]
    if row.is_missing:
        commands = THEN.join(rf"\texttt{{{escape(command)}}}" for command in row.command.split(THEN))
        words = rf"not measured: {commands}" if row.command else "not measured"
        return " & ".join([*start, rf"\multicolumn{{{len(columns)}}}{{p{{0.6\linewidth}}}}{{\raggedright {words}}}"])
    cells = ["--" if text is None else f"${_math(text)}$" for text in row.texts(columns)]
    return " & ".join([*start, *(rf"\textit{{{cell}}}" if row.is_published else cell for cell in cells)])


def _math(text: str) -> str:
    r"""A number with its interval for math mode, where - is a minus and the space before the interval is kept."""
    return text.replace(" [", r"\;[").replace(", ", r",\,")


def escape(text: str) -> str:
    """Plain text for LaTeX."""
    return "".join(ESCAPES.get(letter, letter) for letter in text)


def to_latex_document(tables: Sequence[Table], source: str) -> str:
    """A document that compiles by itself and takes in the file of every table."""
    inputs = "\n".join(rf"\input{{{table.key}}}" for table in tables)
    return f"% {' '.join(source.split())}\n{PREAMBLE}{inputs}\n\\end{{document}}\n"


def to_csv(table: Table) -> str:
    """One line per row and column, with the unrounded numbers; what was not measured has its command."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "of", "column", "value", "low", "high", "command"])
    for row in table.rows:
        if row.is_missing:
            writer.writerow([row.label, row.origin, "", "", "", "", row.command])
        for cell, column in zip(row.cells, table.columns, strict=True):
            if cell is not None:
                ends = ["" if end is None else repr(end) for end in (cell.low, cell.high)]
                writer.writerow([row.label, row.origin, column.title, repr(cell.value), *ends, ""])
    return text.getvalue()
