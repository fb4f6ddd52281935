"""A CSV that grows by a row a scan and can be taken up again after any stop: path, key, numbers."""

import csv
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256, write_text

KEYS = ["path", "key"]


def content_key(path: Path, identity: str) -> str:
    """Of a file's bytes and of who makes the numbers: a scan that is replaced, or another model, has another key."""
    return hashlib.sha256(f"{file_sha256(path)}{identity}".encode()).hexdigest()[:16]


@dataclass
class ResumableCsv:
    """Rows are appended whole and flushed; nine digits give back the same float32."""

    columns: list[str]
    handle: IO[str]
    keys: dict[str, str] = field(default_factory=dict)  # by path
    superseded: bool = False  # some row has a later one of the same path

    @classmethod
    def open(cls, path: Path, columns: Sequence[str]) -> Self:
        """The table at `path`, made if it is not there; a torn last row is dropped, the latest row of a path counts.

        Raises:
            UserError: there is something else at `path`.
        """
        keys = _tidy(path, [*KEYS, *columns])
        return cls(list(columns), open(path, "a", newline="", encoding="utf-8"), keys)

    def has(self, path: Path, key: str) -> bool:
        """Whether this very scan has a row."""
        return self.keys.get(os.fspath(path)) == key

    def add(self, path: Path, key: str, values: Sequence[float]) -> None:
        """Append a row."""
        if len(values) != len(self.columns):
            raise ValueError(f"{len(values)} values for {len(self.columns)} columns")
        self.superseded |= os.fspath(path) in self.keys
        self.handle.write(_line([os.fspath(path), key, *(f"{value:.9g}" for value in values)]))
        self.handle.flush()
        self.keys[os.fspath(path)] = key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()
        if self.superseded:
            _tidy(Path(self.handle.name), [*KEYS, *self.columns])


def _tidy(path: Path, header: list[str]) -> dict[str, str]:
    """Write the table anew, whole, with the latest row of each path; keys by path."""
    rows = {row[0]: row for row in _read(path, header)} if path.exists() else {}
    write_text(path, "".join(_line(row) for row in (header, *rows.values())))
    return {name: row[1] for name, row in rows.items()}


def _line(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _read(path: Path, header: list[str]) -> list[list[str]]:
    """Whole rows of the table."""
    try:
        text = path.read_text(encoding="utf-8")
        found = list(csv.reader(io.StringIO(text, newline="")))
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error}): choose another -o") from error
    if found and found[0] != header:
        raise UserError(f"{path} is no table of y with {len(header) - len(KEYS)} columns: choose another -o")
    if found and not text.endswith("\n"):
        found.pop()
    return [row for row in found[1:] if len(row) == len(header)]
