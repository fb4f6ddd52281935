"""Participants' diagnosis, age and sex, from participants.tsv, sessions.tsv or the CSV of paths.

A session's own value takes precedence over the participant's. Ages are at the session: if only the participant's age
is known, the months since the first session are added.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldae.data.sessions import parse_session
from ldae.data.table import MAX_AGE
from ldae.preprocessing.sources import SourceScan
from ldae.utils.errors import UserError

EMPTY = {"", "n/a", "na", "nan"}
Row = dict[str, str]  # column -> cell


@dataclass(frozen=True)
class Columns:
    """Names that a column may have in the tables; the first one that is present and filled is used."""

    diagnosis: Sequence[str] = ("diagnosis", "dx", "group")
    age: Sequence[str] = ("age", "age_at_session", "age_bl")
    sex: Sequence[str] = ("sex", "gender")
    months: Sequence[str] = ("months", "months_from_baseline")


@dataclass(frozen=True)
class Participant:
    """A participant at one session.

    Attributes:
        months: since the first session, None if unknown.
        diagnosis, sex: "" if unknown.
        age: years at the session, NaN if unknown.
    """

    months: int | None
    diagnosis: str
    age: float
    sex: str


class Participants:
    """The participants and sessions of a data set.

    Args:
        root: folder with participants.tsv and sub-*/sub-*_sessions.tsv, or None if the scans come with their own data.
        columns: names of the columns.
        participants: another file instead of root/participants.tsv; sessions are then sought beside it, too.

    Raises:
        UserError: a file is missing or is not a TSV.
    """

    def __init__(self, root: Path | None, columns: Columns, participants: Path | None = None) -> None:
        self.columns = columns
        self.roots = [folder for folder in (root, participants and participants.parent) if folder is not None]
        if participants is None and root is not None:
            participants = root / "participants.tsv"
        elif participants is not None and not participants.is_file():
            raise UserError(f"no such file: {participants}")
        rows = _read_tsv(participants) if participants else []
        self.participants = {_with_prefix("sub-", row.get("participant_id", "")): row for row in rows}
        self._sessions: dict[str, dict[str, Row]] = {}  # by subject and session, read when first needed

    def look_up(self, scan: SourceScan, only: bool) -> Participant:
        """Find the participant of a scan.

        Args:
            only: whether this is the subject's only session, which is then taken for the first.
        """
        own = [scan.metadata, self._sessions_of(scan.subject).get(scan.session, {})]
        rows = [*own, self.participants.get(scan.subject, {})]
        months = self._months(scan, own, only)
        age, baseline_age = (_parse_number(_first_filled(part, self.columns.age)) for part in (own, rows[2:]))
        if not math.isfinite(age):
            age = baseline_age + (months or 0) / 12
        sex = _first_filled(rows, self.columns.sex)
        return Participant(
            months=months,
            diagnosis=_first_filled(rows, self.columns.diagnosis),
            age=round(age, 4) if 0 <= age <= MAX_AGE else math.nan,
            sex=sex[:1].upper() if sex.lower() in ("m", "f", "male", "female") else sex,
        )

    def _months(self, scan: SourceScan, own: list[Row], only: bool) -> int | None:
        """Months since the first session: from the label, a column of months, ages, or 0 for the only session."""
        if scan.session:
            try:
                return parse_session(scan.session)  # ses-M012 is in months; ses-01 numbers the visits
            except ValueError:
                pass
        months = _parse_number(_first_filled(own, self.columns.months))
        if math.isfinite(months):
            return round(months)
        sessions = self._sessions_of(scan.subject).values()
        ages = [_parse_number(_first_filled([row], self.columns.age)) for row in sessions]
        age = _parse_number(_first_filled(own, self.columns.age))
        if math.isfinite(age) and ages and all(map(math.isfinite, ages)):
            return round(12 * (age - min(ages)))
        return 0 if only else None

    def _sessions_of(self, subject: str) -> dict[str, Row]:
        if subject not in self._sessions:
            paths = (root / subject / f"{subject}_sessions.tsv" for root in self.roots)
            rows = next(filter(None, map(_read_tsv, paths)), [])
            self._sessions[subject] = {_with_prefix("ses-", row.get("session_id", "")): row for row in rows}
        return self._sessions[subject]


def _read_tsv(path: Path) -> list[Row]:
    """Rows of a TSV; none if the file does not exist."""
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            return [
                {key.strip(): (value or "").strip() for key, value in row.items() if key is not None}
                for row in csv.DictReader(handle, delimiter="\t")
            ]
    except (OSError, UnicodeError, csv.Error, AttributeError) as error:
        raise UserError(f"cannot read {path} as a TSV in UTF-8 ({error})") from error


def _with_prefix(prefix: str, text: str) -> str:
    return text if text.startswith(prefix) else prefix + text


def _first_filled(rows: list[Row], names: Sequence[str]) -> str:
    """The first cell that is filled, "" if there is none; earlier rows take precedence, then earlier names."""
    for row in rows:
        for name in names:
            if row.get(name, "").lower() not in EMPTY:
                return row[name]
    return ""


def _parse_number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
