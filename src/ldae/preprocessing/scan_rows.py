"""The rows of the tables that are about a scan: of its session, of its subject, and of the subject's other sessions."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ldae.data.sessions import parse_date, parse_session
from ldae.preprocessing.participant_rows import ParticipantRow
from ldae.preprocessing.session_times import SessionTime
from ldae.preprocessing.sources import SourceScan
from ldae.utils.errors import UserError

MONTHS_OF_ONE_AGE = 18.0  # ages in whole years may be equal at visits that are nearer


@dataclass(frozen=True)
class RowsOfScan:
    """The rows about a scan.

    Attributes:
        session: of its session, the most specific table first.
        subject: of its subject without a session.
        others: of its subject's other sessions.
    """

    session: list[ParticipantRow]
    subject: list[ParticipantRow]
    others: list[ParticipantRow]

    @property
    def own(self) -> list[ParticipantRow]:
        """The rows whose values are those of the scan."""
        return self.session + self.subject

    def age(self, months: float | None) -> float:
        """Years at the session, `months` after the first one; NaN if unknown."""
        passed = (months or 0) / 12
        rows = self.session + self.others
        ages = [row.age + passed for row in rows] if self._has_one_age() else [row.age for row in self.session]
        ages += [row.age + passed for row in self.subject]
        ages += [row.baseline_age + passed for row in self.own + self.others]
        if months is not None:
            ages += [row.age + passed - row_months(row) / 12 for row in self.others]
        return _first(ages)

    def times(self, scan: SourceScan) -> dict[str, SessionTime]:
        """What is known of the time of the scan's session and of the subject's other sessions, by label."""
        rows = [(scan.session, row) for row in self.session]
        rows += [(_session_name(row.session), row) for row in self.others]
        ages = [row.age for _, row in rows if math.isfinite(row.age)]
        tells_time = len(set(ages)) == len(ages) or len({label for label, _ in rows}) == 1
        found = {scan.session: SessionTime(date=scan.date)}
        for label, row in rows:
            earlier = found.get(label, SessionTime())
            found[label] = SessionTime(
                months=_first([earlier.months, row.months]),
                date=earlier.date or parse_date(row.date),
                age=_first([earlier.age, row.age]) if tells_time else math.nan,
            )
        return found

    def _has_one_age(self) -> bool:
        """Whether one age is given for sessions that are too far apart for it: it is that of the first session."""
        known = [row for row in self.session + self.others if math.isfinite(row.age)]
        months = [time for row in known if math.isfinite(time := row_months(row))]
        return (
            len({row.age for row in known}) == 1 and len(months) > 1 and max(months) - min(months) > MONTHS_OF_ONE_AGE
        )


def row_months(row: ParticipantRow) -> float:
    """Months since the first session by the row's own column or label; NaN if unknown."""
    return row.months if math.isfinite(row.months) else _label_months(row.session)


def select_rows(rows: Sequence[ParticipantRow], scan: SourceScan, only: bool) -> list[ParticipantRow]:
    """The row of the scan's session, as a list of one; empty if there is none.

    Sessions are compared as labels, then as months. A scan without a session has the only row, or that of month 0.

    Raises:
        UserError: several different rows fit.
    """
    months = _label_months(scan.session)
    if not math.isfinite(months) and only:
        months = 0.0
    label = _label_key(scan.session)
    fitting = [row for row in rows if label and _label_key(row.session) == label]
    fitting = fitting or [row for row in rows if row_months(row) == months]
    if not fitting and not scan.session:
        fitting = list(rows)
    return merge_rows(fitting, scan)


def merge_rows(rows: Sequence[ParticipantRow], scan: SourceScan) -> list[ParticipantRow]:
    """The first of rows that have the same values.

    Raises:
        UserError: their values differ.
    """
    for row in rows[1:]:
        if not row.is_like(rows[0]):
            name = f"{scan.subject} {scan.session}".strip()
            raise UserError(
                f"{row.row.table}, line {row.row.line}: a second row fits {name}, with other values than line "
                f"{rows[0].row.line}: remove one, or tell them apart in a column session_id"
            )
    return list(rows[:1])


def _first(values: Iterable[float]) -> float:
    return next((value for value in values if math.isfinite(value)), math.nan)


def _label_months(session: str) -> float:
    try:
        return float(parse_session(session))
    except ValueError:
        return math.nan


def _session_name(session: str) -> str:
    return session if session.lower().startswith("ses-") else f"ses-{session}"


def _label_key(session: str) -> str:
    label = session.strip().casefold().removeprefix("ses-")
    return label.lstrip("0") or "0" if label.isdigit() else label
