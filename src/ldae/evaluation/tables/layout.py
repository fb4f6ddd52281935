"""What a table consists of: columns, rows, and cells with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

THEN = ", then "  # between two commands
PAPER = "paper, ADNI"  # the mark of every row that is not of this run's cohort


@dataclass(frozen=True)
class Cell:
    """A number with its interval, if it has one.

    Attributes:
        at_least: whether the number is a lower bound, as the paper gives one.
    """

    value: float
    low: float | None = None
    high: float | None = None
    at_least: bool = False

    @classmethod
    def read(cls, metrics: Mapping[str, float], name: str) -> Self | None:
        """The metric `name` and its interval; None if it was not measured."""
        if name not in metrics:
            return None
        return cls(metrics[name], metrics.get(f"{name}_low"), metrics.get(f"{name}_high"))

    def format(self, digits: int) -> str:
        """`0.931 [0.896, 0.961]` with so many digits after the point."""

        def rounded(number: float) -> str:
            return f"{round(number, digits) + 0.0:.{digits}f}"  # no -0.00

        text = f"{'> ' if self.at_least else ''}{rounded(self.value)}"
        if self.low is not None and self.high is not None:
            text += f" [{rounded(self.low)}, {rounded(self.high)}]"
        return text


@dataclass(frozen=True)
class Column:
    """A column of numbers; `digits` after the point."""

    title: str
    digits: int = 3


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        cells: one for each column; None where nothing was measured.
        origin: what the numbers are of, such as this run's name, or `PAPER`.
        command: what measures the row; shown if it has no cell at all.
        digits: after the point, in place of those of the columns.
    """

    label: str
    cells: Sequence[Cell | None]
    origin: str
    command: str = ""
    digits: int | None = None

    def texts(self, columns: Sequence[Column]) -> list[str | None]:
        """The cells as text; None where nothing was measured."""
        return [
            None if cell is None else cell.format(column.digits if self.digits is None else self.digits)
            for cell, column in zip(self.cells, columns, strict=True)
        ]

    @property
    def is_missing(self) -> bool:
        """Whether nothing of it was measured."""
        return all(cell is None for cell in self.cells)

    @property
    def is_published(self) -> bool:
        """Whether it is the paper's, and so of another cohort."""
        return self.origin == PAPER


@dataclass(frozen=True)
class Table:
    """A table with its title, and notes on how to read it.

    Attributes:
        key: name of its files.
    """

    key: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"table {self.key}, row {row.label}: {len(row.cells)} cells")
