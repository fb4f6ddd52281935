"""A CSV file of numbers by scan to which rows are appended, and which can be continued after any interruption."""

import csv
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256, write_text

KEYS = ["path", "key"]


def content_key(path: Path, identity: str) -> str:
    """A key that changes with the content of the file at `path` and with `identity`, which says how it is processed."""
    return hashlib.sha256(f"{file_sha256(path)}{identity}".encode()).hexdigest()[:16]


@dataclass
class ResumableCsv:
    """Rows of a path, a key and numbers. Each is appended and flushed at once, with enough digits to restore float32.

    Attributes:
        columns: names of the numbers.
        handle: the open file.
        keys: key of the latest row of each path.
        superseded: whether some row has a later one of the same path.
    """

    columns: list[str]
    handle: IO[str]
    keys: dict[str, str] = field(default_factory=dict)
    superseded: bool = False

    @classmethod
    def open(cls, path: Path, columns: Sequence[str]) -> Self:
        """Open or make the table at `path`. An incomplete last row and all but the latest row of a path are dropped.

        Raises:
            UserError: the file at `path` is not such a table.
        """
        keys = _drop_superseded(path, columns)
        return cls(list(columns), open(path, "a", newline="", encoding="utf-8"), keys)

    def has(self, path: Path, key: str) -> bool:
        """Whether the latest row of this path has this key."""
        return self.keys.get(os.fspath(path)) == key

    def add(self, path: Path, key: str, values: Sequence[float]) -> None:
        """Append a row."""
        if len(values) != len(self.columns):
            raise ValueError(f"{len(values)} values for {len(self.columns)} columns")
        self.superseded |= os.fspath(path) in self.keys
        self.handle.write(_line(format_row(path, key, values)))
        self.handle.flush()
        self.keys[os.fspath(path)] = key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()
        if self.superseded:
            _drop_superseded(Path(self.handle.name), self.columns)


def read_rows(path: Path, columns: Sequence[str]) -> dict[str, list[str]]:
    """The latest complete row of each path in a table; empty if the table does not exist.

    Raises:
        UserError: the file at `path` is not such a table.
    """
    return {row[0]: row for row in _read(path, [*KEYS, *columns])} if path.exists() else {}


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a whole table atomically."""
    write_text(path, "".join(_line(row) for row in ([*KEYS, *columns], *rows)))


def format_row(path: Path, key: str, values: Sequence[float]) -> list[str]:
    """The cells of a row, with enough digits to restore float32."""
    return [os.fspath(path), key, *(f"{value:.9g}" for value in values)]


def _drop_superseded(path: Path, columns: Sequence[str]) -> dict[str, str]:
    """Rewrite the table with the latest row of each path. Returns the keys by path."""
    rows = read_rows(path, columns)
    write_rows(path, columns, rows.values())
    return {name: row[1] for name, row in rows.items()}


def _line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _read(path: Path, header: list[str]) -> list[list[str]]:
    """The complete rows of the table."""
    try:
        text = path.read_text(encoding="utf-8")
        found = list(csv.reader(io.StringIO(text, newline="")))
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error}): choose another -o") from error
    if found and found[0] != header:
        raise UserError(f"{path} is not a table of y with {len(header) - len(KEYS)} columns: choose another -o")
    if found and not text.endswith("\n"):
        found.pop()
    return [row for row in found[1:] if len(row) == len(header)]
