"""The rows of participants.tsv, sessions.tsv and the CSV of paths, with their cells as values."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from ldae.data.columns import find_columns, select_cell
from ldae.data.delimited import Row, exists_or_refuse, read_text_table
from ldae.data.sessions import parse_session
from ldae.data.subjects import subject_key
from ldae.data.values import find_sex_codes, is_missing, parse_age, parse_diagnosis, parse_sex
from ldae.utils.errors import UserError

ROLES = ("subject", "session", "months", "date", "age", "baseline_age", "diagnosis", "sex")
Names = Sequence[str] | None


@dataclass(frozen=True)
class Columns:
    """Names of the columns by what they contain; the first one that is filled is used.

    None finds a column by the names in `ldae.data.columns.SYNONYMS`; two such columns with different contents are
    refused.

    Attributes:
        sex_codes: meaning of numbers in the column of the sex, such as {0: F, 1: M}; see `ldae.data.values`.
    """

    subject: Names = None
    session: Names = None
    months: Names = None
    date: Names = None
    age: Names = None
    baseline_age: Names = None
    diagnosis: Names = None
    sex: Names = None
    sex_codes: Mapping[float, str] | None = None

    def __post_init__(self) -> None:
        for code, sex in (self.sex_codes or {}).items():
            try:
                float(code), parse_sex(str(sex), {})
            except ValueError as error:
                raise UserError(
                    f"preprocess.columns.sex_codes: {code}: {sex} is not a number and M, F or O, as in {{0: F, 1: M}}"
                ) from error

    def find(self, header: Sequence[str]) -> dict[str, list[str]]:
        """The columns of a header by role."""
        return {role: find_columns(header, role, getattr(self, role)) for role in ROLES}


@dataclass(frozen=True)
class ParticipantRow:
    """One row as values.

    Attributes:
        row: the row as text.
        subject, session: as written; "" if the table has no such column.
        months: since the first session, NaN if unknown.
        date: of the session as written.
        age: years at the session of the row, or at the first session if it has none; NaN if unknown.
        baseline_age: years at the first session, NaN if unknown.
        diagnosis, sex: "" if unknown.
        texts: the cells that were read, by role.
        not_understood: the roles whose cell follows no rule.
        by_rule: the roles whose cell is not a plain number.
    """

    row: Row = field(compare=False)
    subject: str = ""
    session: str = ""
    months: float = math.nan
    date: str = ""
    age: float = math.nan
    baseline_age: float = math.nan
    diagnosis: str = ""
    sex: str = ""
    texts: Mapping[str, str] = field(default_factory=dict, compare=False)
    not_understood: frozenset[str] = field(default=frozenset(), compare=False)
    by_rule: frozenset[str] = field(default=frozenset(), compare=False)

    def is_like(self, other: "ParticipantRow") -> bool:
        """Whether both rows have the same values; differences in spelling and in other columns do not count."""
        names = [item.name for item in fields(self) if item.compare and item.name not in ("subject", "session")]
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return all(a == b or (a != a and b != b) for a, b in pairs)


def read_participant_rows(path: Path, columns: Columns) -> tuple[list[str], list[ParticipantRow]]:
    """The header and the rows of a table; nothing if there is no such file.

    Raises:
        UserError: it is not a table, is a dangling link, or two columns of one kind have different contents.
    """
    if not exists_or_refuse(path):
        return [], []
    table = read_text_table(path)
    return table.header, parse_rows(table.header, table.rows, columns)


def parse_rows(header: Sequence[str], rows: Sequence[Row], columns: Columns) -> list[ParticipantRow]:
    """Rows of one table as values.

    Raises:
        UserError: two columns of one kind have different contents.
    """
    names = columns.find(header)
    cells = (row.cells.get(name, "") for row in rows for name in names["sex"])
    codes = find_sex_codes(cells) if columns.sex_codes is None else columns.sex_codes
    parsers: dict[str, Callable[[str], object]] = {
        "subject": subject_key,
        "session": _session_value,
        "months": _parse_months,
        "date": str,
        "age": lambda text: parse_age(text).years,
        "baseline_age": lambda text: parse_age(text).years,
        "diagnosis": parse_diagnosis,
        "sex": lambda text: parse_sex(text, {float(code): parse_sex(str(sex), {}) for code, sex in codes.items()}),
    }
    return [_parse_row(row, names, columns, parsers) for row in rows]


def _parse_row(
    row: Row, names: Mapping[str, list[str]], columns: Columns, parsers: Mapping[str, Callable[[str], object]]
) -> ParticipantRow:
    values: dict[str, object] = {}
    texts, not_understood, by_rule = {}, set(), set()
    for role, parse in parsers.items():
        text = _select(row, role, names[role], columns, parse)
        if not text:
            continue
        texts[role] = text
        try:
            value = parse(text)
        except ValueError:
            not_understood.add(role)
            continue
        if role in ("subject", "session", "date"):
            value = "" if is_missing(text) and role != "subject" else text
        elif role in ("age", "baseline_age") and not parse_age(text).is_plain:
            by_rule.add(role)
        values[role] = value
    return ParticipantRow(
        row, **values, texts=texts, not_understood=frozenset(not_understood), by_rule=frozenset(by_rule)
    )


def _select(row: Row, role: str, names: Sequence[str], columns: Columns, parse: Callable[[str], object]) -> str:
    """The cell of a role: of columns that the user named, the first one that is filled."""
    if getattr(columns, role) is not None:
        codes = role != "subject"
        return next((row.cells[name] for name in names if not is_missing(row.cells.get(name, ""), codes)), "")

    remedy = f"choose one with {override(role, names[0] if names else 'NAME')}"
    return select_cell(row, names, parse, remedy)


def override(role: str, column: str) -> str:
    """The option of `ldae preprocess` that names the column of a role, quoted for the shell."""
    if re.fullmatch(r"[A-Za-z]\w*", column):
        return f"--set preprocess.columns.{role}=[{column}]"
    return f"""--set 'preprocess.columns.{role}=["{column}"]'"""


def _session_value(text: str) -> str | int:
    try:
        return parse_session(text)
    except ValueError:
        return text.removeprefix("ses-")


def _parse_months(text: str) -> float:
    if is_missing(text):
        return math.nan
    try:
        return float(text)
    except ValueError:
        return float(parse_session(text))
