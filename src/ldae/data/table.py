"""The table of scans: a CSV file with one row per scan. Every error names the file, the line and the column.

Subjects stay text, because leading zeros matter. Columns that this project does not know are kept.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from ldae.data.delimited import Row, read_text_table
from ldae.data.sessions import parse_session, session_label
from ldae.utils.errors import UserError
from ldae.utils.files import replacing

REQUIRED = ("subject", "session", "path", "diagnosis", "age")
PATHS = ("path", "latent_path", "labels_path")
SPLITS = ("train", "val", "test")
MAX_AGE = 130.0  # years; a larger number is not an age in years

_EMPTY = {"", "na", "n/a", "nan"}
# A spreadsheet program that opens a written table would evaluate such a cell. A sign before a number or a word is
# harmless.
_FORMULA = re.compile(r"=|@|[+-].*[(|!=]", re.DOTALL)
# A number that can be written back without a change: "007" and "1_000" stay text.
_NUMBER = re.compile(r"[-+]?(?:0|[1-9]\d*)(?:\.\d*)?(?:[eE][-+]?\d+)?")


def read_table(path: Path | str, require_files: bool = True) -> pd.DataFrame:
    """Read and check a table.

    Paths (`path`, `latent_path`, `labels_path`) are relative to the folder of the table; they are absolute in the
    result.

    Args:
        require_files: whether every scan must exist.

    Returns:
        Columns subject (str), session ("ses-M012"), months (int), path (str), diagnosis (str, may be empty), age
        (float, years, may be NaN), split if the table has it (str, may be empty), and all others; rows in the order of
        the file.

    Raises:
        UserError: the table is missing, unreadable or empty, a column is missing, or a cell is invalid.
    """
    path = Path(path)
    seen: dict[tuple[str, str], int] = {}
    splits: dict[str, tuple[str, int]] = {}
    records = []
    for row in _rows(path):
        record = _record(row, require_files)
        _check_against_others(row, record, seen, splits)
        records.append(record)
    if not records:
        raise UserError(f"{path} has no rows: one row per scan is needed")
    columns = [*REQUIRED[:2], "months", *REQUIRED[2:]]
    columns += [name for name in records[0] if name not in columns]
    table = pd.DataFrame({name: _column(name, [record[name] for record in records]) for name in columns})
    if "split" in table and (table["split"] == "").all():
        return table.drop(columns="split")
    return table


def scan_names(table: pd.DataFrame, rows: Sequence[int]) -> list[str]:
    """Human-readable names of rows of a table: subject and session."""
    return [f"{table['subject'].iloc[row]} {table['session'].iloc[row]}" for row in rows]


def write_table(table: pd.DataFrame, path: Path | str) -> None:
    """Write a table atomically, with paths relative to its folder as `read_table` expects them.

    The folder can then be moved together with its files, and a shared table contains no absolute paths. Text that a
    spreadsheet program would evaluate gets a leading apostrophe.
    """
    path = Path(path)
    folder = os.path.abspath(path.parent)
    table = table.copy()
    for name in PATHS:
        if name in table:
            table[name] = [_relative(value, folder) for value in table[name]]
    for name in table.select_dtypes(object):
        table[name] = [f"'{v}" if isinstance(v, str) and _FORMULA.match(v) else v for v in table[name]]
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def _rows(path: Path) -> Iterator[Row]:
    table = read_text_table(path, ", ".join(REQUIRED))
    for name in table.header:
        if _FORMULA.match(name):
            raise UserError(
                f"{path}, line {table.line}, column {name[:40]!r}: a spreadsheet program would evaluate it: rename it"
            )
    for name in REQUIRED:
        if name not in table.header:
            raise UserError(
                f"{path}, line {table.line}, column '{name}': it is missing; the header has {', '.join(table.header)}"
            )
    yield from table.rows


def _record(row: Row, require_files: bool) -> dict[str, str | int | float]:
    """The checked values of one row, with their types."""
    cells = row.cells
    record: dict[str, str | int | float] = dict(cells)
    for name in REQUIRED:
        if _FORMULA.match(cells[name]):
            raise row.error(name, f"{cells[name][:40]!r} is a formula to a spreadsheet program: change it")
    record["subject"] = _subject(row)
    try:
        months = parse_session(cells["session"])
    except ValueError as error:
        raise row.error("session", str(error)) from error
    record |= {"session": session_label(months), "months": months, "age": _age(row)}
    if cells["diagnosis"].lower() in _EMPTY:
        record["diagnosis"] = ""
    for name in PATHS:
        if cells.get(name):
            record[name] = os.path.abspath(os.path.join(row.table.parent, cells[name]))
    if not cells["path"]:
        raise row.error("path", "it is empty")
    if require_files and not os.path.isfile(record["path"]):
        raise row.error("path", f"no such file: {record['path']}")
    if "split" in cells and cells["split"] not in ("", *SPLITS):
        raise row.error("split", f"{cells['split']!r} is none of {', '.join(SPLITS)}")
    return record


def _subject(row: Row) -> str:
    subject = row.cells["subject"]
    # Subjects are used in file names.
    if not subject or subject in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", subject):
        raise row.error("subject", f"{subject!r} is not a name: it must not be empty or contain / or \\")
    return subject


def _age(row: Row) -> float:
    text = row.cells["age"]
    if text.lower() in _EMPTY:
        return math.nan
    try:
        age = float(text)
    except ValueError:
        age = math.nan
    if not 0 <= age <= MAX_AGE:
        raise row.error("age", f"{text!r} is not an age in years; leave it empty if it is unknown")
    return age


def _check_against_others(
    row: Row,
    record: dict[str, str | int | float],
    seen: dict[tuple[str, str], int],
    splits: dict[str, tuple[str, int]],
) -> None:
    """Refuse a scan that appears twice, and a subject in two splits."""
    key = (record["subject"], record["session"])
    first = seen.setdefault(key, row.line)
    if first != row.line:
        raise row.error("session", f"subject {key[0]!r}, session {key[1]} is already in line {first}")
    split = record.get("split", "")
    if split:
        other, line = splits.setdefault(record["subject"], (split, row.line))
        if other != split:
            raise row.error("split", f"subject {key[0]!r} is in '{split}' here, but in '{other}' in line {line}")


def _column(name: str, values: list) -> pd.Series:
    """A column: as numbers if all its cells are numbers that lose nothing by it, otherwise as text."""
    if name in (*REQUIRED, *PATHS, "split", "months") or not any(values):
        return pd.Series(values, dtype=None if name in ("age", "months") else object)
    known = [value for value in values if value.lower() not in _EMPTY]
    if known and all(_NUMBER.fullmatch(value) for value in known):
        return pd.to_numeric(pd.Series([None if value.lower() in _EMPTY else value for value in values], dtype=object))
    return pd.Series(values, dtype=object)


def _relative(value: str, folder: str) -> str:
    return os.path.relpath(value, folder) if isinstance(value, str) and os.path.isabs(value) else value
