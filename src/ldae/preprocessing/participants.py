"""Who was scanned, and when: diagnosis, age and sex from participants.tsv, sessions.tsv or the CSV of paths.

What a session says wins over what is said of the participant. Ages are at the session: where only the participant's is
known, the months since the first session are added.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldae.data.table import MAX_AGE, parse_session
from ldae.preprocessing.sources import SourceScan
from ldae.utils.errors import UserError

EMPTY = {"", "n/a", "na", "nan"}


@dataclass(frozen=True)
class Columns:
    """Names that a column may have; the first that is there and filled counts."""

    diagnosis: Sequence[str] = ("diagnosis", "dx", "group")
    age: Sequence[str] = ("age", "age_at_session", "age_bl")
    sex: Sequence[str] = ("sex", "gender")
    months: Sequence[str] = ("months", "months_from_baseline")


@dataclass(frozen=True)
class Participant:
    """months: since the first session, None where it cannot be told; age: years at the session, NaN unknown."""

    months: int | None
    diagnosis: str
    age: float
    sex: str


class Participants:
    """Reads participants.tsv and every sub-*/sub-*_sessions.tsv below `root` (None: what the scans say alone)."""

    def __init__(self, root: Path | None, columns: Columns, participants: Path | None = None) -> None:
        """`participants` names another file than root/participants.tsv; sessions are then sought beside it, too.

        Raises:
            UserError: a file is missing or no TSV.
        """
        self.columns = columns
        self.roots = [folder for folder in (root, participants and participants.parent) if folder is not None]
        if participants is None and root is not None:
            participants = root / "participants.tsv"
        elif participants is not None and not participants.is_file():
            raise UserError(f"no such file: {participants}")
        found = _read(participants) if participants else []
        self.participants = {_prefixed("sub-", row.get("participant_id", "")): row for row in found}
        self._sessions: dict[str, dict[str, dict[str, str]]] = {}

    def look_up(self, scan: SourceScan, only: bool) -> Participant:
        """Who `scan` shows. only: the subject has one session, which then is the first."""
        session = self._session(scan.subject).get(scan.session, {})
        sources = [scan.metadata, session, self.participants.get(scan.subject, {})]
        months = self._months(scan, sources, only)
        own, general = _number(_first(sources[:2], self.columns.age)), _number(_first(sources[2:], self.columns.age))
        age = own if math.isfinite(own) else general + (months or 0) / 12
        sex = _first(sources, self.columns.sex)
        return Participant(
            months=months,
            diagnosis=_first(sources, self.columns.diagnosis),
            age=round(age, 4) if 0 <= age <= MAX_AGE else math.nan,
            sex=sex[:1].upper() if sex.lower() in ("m", "f", "male", "female") else sex,
        )

    def _months(self, scan: SourceScan, sources: list[dict[str, str]], only: bool) -> int | None:
        """By the session's label, by a column of months, by ages, or 0 for the only session."""
        if scan.session:
            try:
                return parse_session(scan.session)  # ses-M012; ses-01 is a count of visits
            except ValueError:
                pass
        told = _number(_first(sources[:2], self.columns.months))
        if math.isfinite(told):
            return round(told)
        ages = [_number(_first([row], self.columns.age)) for row in self._session(scan.subject).values()]
        own = _number(_first(sources[:2], self.columns.age))
        if math.isfinite(own) and ages and all(math.isfinite(age) for age in ages):
            return round(12 * (own - min(ages)))
        return 0 if only else None

    def _session(self, subject: str) -> dict[str, dict[str, str]]:
        if subject not in self._sessions:
            paths = (root / subject / f"{subject}_sessions.tsv" for root in self.roots)
            rows = next(filter(None, map(_read, paths)), [])
            self._sessions[subject] = {_prefixed("ses-", row.get("session_id", "")): row for row in rows}
        return self._sessions[subject]


def _read(path: Path) -> list[dict[str, str]]:
    """Rows of a TSV; none where there is no file."""
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


def _prefixed(prefix: str, text: str) -> str:
    return text if text.startswith(prefix) else prefix + text


def _first(rows: list[dict[str, str]], names: Sequence[str]) -> str:
    for row in rows:
        for name in names:
            if row.get(name, "").lower() not in EMPTY:
                return row[name]
    return ""


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
