"""The columns of a table of scans under their names in this project: subject, session, path, diagnosis, age and sex.

A column with one of these names is taken, whatever other columns the table has. Otherwise it is found by a synonym and
renamed; `sex` is added, and the column it is read from stays.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldae.data.columns import ColumnReport, find_columns, select_cell
from ldae.data.delimited import Row
from ldae.data.sessions import parse_bare_number, parse_session
from ldae.data.subjects import subject_key
from ldae.data.values import find_sex_codes, parse_age, parse_diagnosis, parse_sex
from ldae.utils.errors import UserError

NAMES = ("subject", "session", "path", "diagnosis", "age", "sex")
# If a table has no column of the first kind, one of the second is used.
SUBSTITUTES = {"session": "months", "age": "baseline_age"}
_IN_MONTHS = ("session", "session_id", "months")  # other columns may count visits
PARSERS: dict[str, Callable[[str], object]] = {
    "subject": subject_key,
    "session": parse_session,
    "path": str,
    "diagnosis": parse_diagnosis,
    "age": lambda text: parse_age(text).years,
    "sex": lambda text: parse_sex(text, {}),
}


@dataclass(frozen=True)
class ScanRow:
    """A row of a table of scans.

    Attributes:
        text: the row as it is written.
        cells: text by column, with the names of this project.
        columns: for each of these names, the columns that the table has for it.
        is_baseline_age: whether the age is that at the first session.
    """

    text: Row
    cells: dict[str, str]
    columns: Mapping[str, Sequence[str]]
    is_baseline_age: bool

    @property
    def line(self) -> int:
        """Number of the row's first line."""
        return self.text.line

    @property
    def folder(self) -> Path:
        """The folder of the table."""
        return self.text.table.parent

    def error(self, name: str, what: str) -> UserError:
        """An error that names file, line and column."""
        return self.text.error(self.columns.get(name, [name])[0], what)

    def months(self) -> int:
        """Months since the first visit.

        Raises:
            UserError: the session is not in months.
        """
        text, column = self.cells["session"], self.columns["session"][0]
        number = parse_bare_number(text)
        if number is not None and column.lower() not in _IN_MONTHS:
            raise self.error("session", f"{text!r} may count visits: write months as M{number}, or call it session")
        try:
            return parse_session(text)
        except ValueError as error:
            raise self.error("session", str(error)) from error

    def age(self, months: int) -> float:
        """Age in years, NaN if it is missing.

        Raises:
            UserError: it is not an age.
        """
        try:
            age = parse_age(self.cells["age"]).years
        except ValueError as error:
            raise self.error("age", f"{error}; leave it empty if it is unknown") from error
        return round(age + months / 12, 4) if self.is_baseline_age else age


def find_scan_columns(header: Sequence[str]) -> dict[str, list[str]]:
    """The columns of a table for each of NAMES that it has."""
    found = {}
    for name in NAMES:
        columns = find_columns(header, name, [name]) if name in header else find_columns(header, name)
        if not columns and name in SUBSTITUTES:
            columns = find_columns(header, SUBSTITUTES[name])
        if columns:
            found[name] = sorted(columns, key=lambda column: column != name)
    return found


def name_columns(rows: Sequence[Row], columns: Mapping[str, Sequence[str]]) -> list[ScanRow]:
    """Rows with the names of this project for the columns that were found.

    Raises:
        UserError: two columns with one content differ.
    """
    replaced = {column for name, names in columns.items() if name != "sex" for column in names}
    header = list(rows[0].cells) if rows else []
    is_baseline_age = not set(columns.get("age", ())) & set(find_columns(header, "age"))
    named = []
    for row in rows:
        cells = {
            name: select_cell(row, names, PARSERS[name], f"rename the right one to '{name}'")
            for name, names in columns.items()
        }
        others = {column: cell for column, cell in row.cells.items() if column not in replaced}
        named.append(ScanRow(row, others | cells, columns, is_baseline_age))
    return named


def read_sexes(rows: Sequence[ScanRow]) -> list[str | None]:
    """The sex of each row, "" if it is missing, None where it is not understood or the table has no such column."""
    codes = find_sex_codes(row.cells.get("sex", "") for row in rows)
    sexes: list[str | None] = []
    for row in rows:
        try:
            sexes.append(parse_sex(row.cells["sex"], codes) if "sex" in row.cells else None)
        except ValueError:
            sexes.append(None)
    return sexes


def report_columns(rows: Sequence[ScanRow], records: Sequence[Mapping[str, str | int | float]]) -> list[ColumnReport]:
    """What was found of diagnosis, age and sex."""
    sexes = read_sexes(rows)
    header, columns = list(rows[0].text.cells), rows[0].columns
    reports = {name: ColumnReport(name, columns.get(name, ()), header) for name in ("diagnosis", "age", "sex")}
    for row, record, sex in zip(rows, records, sexes, strict=True):
        age = float(record["age"])
        reports["diagnosis"].add(row.cells["diagnosis"], str(record["diagnosis"]))
        is_by_rule = math.isfinite(age) and not parse_age(row.cells["age"]).is_plain
        reports["age"].add(row.cells["age"], age if math.isfinite(age) else "", is_by_rule=is_by_rule)
        reports["sex"].add(row.cells.get("sex", ""), sex or "", is_understood=sex is not None)
    if not columns.get("sex") and not reports["sex"].similar_columns():
        del reports["sex"]
    return list(reports.values())
