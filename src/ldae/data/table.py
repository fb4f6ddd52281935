"""The table of scans: a CSV file with one row per scan. Every error names the file, the line and the column.

Subjects stay text, because leading zeros matter. Columns that this project does not know are kept. Required columns
that have another name are found by the synonyms that preprocessing uses, and cells are read by the same rules.
"""

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ldae.data.delimited import read_text_table
from ldae.data.scan_columns import ScanRow, find_scan_columns, name_columns, read_sexes, report_columns
from ldae.data.sessions import session_label
from ldae.data.subjects import subject_key
from ldae.data.values import parse_diagnosis, unify_case
from ldae.utils.errors import UserError
from ldae.utils.files import replacing

REQUIRED = ("subject", "session", "path", "diagnosis", "age")
PATHS = ("path", "latent_path", "labels_path")
SPLITS = ("train", "val", "test")
MONTHS_OF_ONE_AGE = 18  # ages in whole years may be equal at visits that are nearer

log = logging.getLogger(__name__)

_EMPTY = {"", "na", "n/a", "nan"}
# A spreadsheet program that opens a written table would evaluate such a cell. A sign before a number or a word is
# harmless.
_FORMULA = re.compile(r"=|@|[+-].*[(|!=]", re.DOTALL)
# A number that can be written back without a change: "007" and "1_000" stay text.
_NUMBER = re.compile(r"[-+]?(?:0|[1-9]\d*)(?:\.\d*)?(?:[eE][-+]?\d+)?")


def read_table(path: Path | str, require_files: bool = True, log_columns: bool = True) -> pd.DataFrame:
    """Read and check a table.

    Paths (`path`, `latent_path`, `labels_path`) are relative to the folder of the table; they are absolute in the
    result.

    Args:
        require_files: whether every scan must exist.
        log_columns: whether to log what was found in each column.

    Returns:
        Columns subject (str), session ("ses-M012"), months (int), path (str), diagnosis (str, may be empty), age
        (float, years, may be NaN), sex ("M", "F" or "O") and split (may be empty) if the table has them, and all
        others; a sex that is not understood stays as it is. Rows are in the order of the file.

    Raises:
        UserError: the table is missing, unreadable or empty, a column is missing, or a cell is invalid.
    """
    path = Path(path)
    rows, consistency, records = _rows(path), _Consistency(), []
    for row in rows:
        record = _record(row, require_files)
        consistency.check(row, record)
        records.append(record)
    if not records:
        raise UserError(f"{path} has no rows: one row per scan is needed")
    diagnoses = unify_case([record["diagnosis"] for record in records])
    for record, diagnosis, sex in zip(records, diagnoses, read_sexes(rows), strict=True):
        record |= {"diagnosis": diagnosis} | ({} if sex is None else {"sex": sex})
    for report in report_columns(rows, records) if log_columns else ():
        log.info("%s", report.describe())
    if log_columns:
        _warn_of_baseline_ages(path, records)
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


def _rows(path: Path) -> list[ScanRow]:
    """The rows of a table, with the names of the contract for the columns that it needs."""
    table = read_text_table(path, ", ".join(REQUIRED))
    for name in table.header:
        if _FORMULA.match(name):
            raise UserError(
                f"{path}, line {table.line}, column {name[:40]!r}: a spreadsheet program would evaluate it: rename it"
            )
    columns = find_scan_columns(table.header)
    for name in REQUIRED:
        if name not in columns:
            raise UserError(
                f"{path}, line {table.line}, column '{name}': it is missing; the header has {', '.join(table.header)}"
            )
    return name_columns(table.rows, columns)


def _record(row: ScanRow, require_files: bool) -> dict[str, str | int | float]:
    """The checked values of one row, with their types."""
    cells = row.cells
    record: dict[str, str | int | float] = dict(cells)
    for name in REQUIRED:
        if _FORMULA.match(cells[name]):
            raise row.error(name, f"{cells[name][:40]!r} is a formula to a spreadsheet program: change it")
    record["subject"] = _subject(row)
    months = row.months()
    record |= {
        "session": session_label(months),
        "months": months,
        "age": row.age(months),
        "diagnosis": parse_diagnosis(cells["diagnosis"]),
    }
    for name in PATHS:
        if cells.get(name):
            record[name] = os.path.abspath(os.path.join(row.folder, cells[name]))
    if not cells["path"]:
        raise row.error("path", "it is empty")
    if require_files and not os.path.isfile(record["path"]):
        raise row.error("path", f"no such file: {record['path']}")
    if "split" in cells and cells["split"] not in ("", *SPLITS):
        raise row.error("split", f"{cells['split']!r} is none of {', '.join(SPLITS)}")
    return record


def _warn_of_baseline_ages(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Say so if most subjects have one age at visits that are far apart, which is then that at the first visit."""
    visits: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if math.isfinite(record["age"]):
            visits.setdefault(record["subject"], []).append((record["months"], record["age"]))
    spans = [found for found in visits.values() if max(found)[0] - min(found)[0] > MONTHS_OF_ONE_AGE]
    same = sum(len({age for _, age in found}) == 1 for found in spans)
    if 2 * same > len(spans):
        log.warning(
            "%s: %d of %d subjects with visits years apart have the same age at all of them: if it is the age at the "
            "first visit, name the column age_bl",
            *(path, same, len(spans)),
        )


def _subject(row: ScanRow) -> str:
    subject = row.cells["subject"]
    # Subjects are used in file names.
    if not subject or subject in (".", "..") or re.search(r"[/\\\x00-\x1f\x7f]", subject):
        raise row.error("subject", f"{subject!r} is not a name: it must not be empty or contain / or \\")
    return subject


class _Consistency:
    """Refuses a scan that appears twice, a subject in two splits, and one that is written in two ways."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, str], int] = {}  # the line of each
        self._splits: dict[str, tuple[str, int]] = {}
        self._spellings: dict[str, tuple[str, int]] = {}

    def check(self, row: ScanRow, record: Mapping[str, str | int | float]) -> None:
        subject, session, line = record["subject"], record["session"], row.line
        first = self._sessions.setdefault((subject, session), line)
        if first != line:
            raise row.error("session", f"subject {subject!r}, session {session} is already in line {first}")
        other, first = self._spellings.setdefault(subject_key(subject), (subject, line))
        if other != subject:
            raise row.error("subject", f"{subject!r} and {other!r} in line {first} may be one person: write them alike")
        split = record.get("split", "")
        if split:
            other, first = self._splits.setdefault(subject, (split, line))
            if other != split:
                raise row.error("split", f"subject {subject!r} is in '{split}' here, but in '{other}' in line {first}")


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
