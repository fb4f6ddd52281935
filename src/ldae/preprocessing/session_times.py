"""The months of a subject's sessions since the first one, from labels, columns, dates or ages.

In order of precedence: a label with a unit (M012, bl, d0365), a column of months, dates (`acq_time`, or a date as
label), ages. Dates and ages count from a session whose months are known, or else from the earliest one. If nothing is
known but the labels number the visits, the lowest number is the first session. An only session is the first one, too.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from ldae.data.sessions import MONTHS_PER_DAY, parse_date, parse_session, parse_visit_number

EPOCH = datetime(1900, 1, 1)
REMEDY = "give its sub-*_sessions.tsv a column acq_time, age or months, or label sessions in months (ses-M012)"


@dataclass(frozen=True)
class SessionTime:
    """What the tables say about the time of a session.

    Attributes:
        months: since the first session, NaN if unknown.
        date: None if unknown.
        age: years, NaN if unknown.
    """

    months: float = math.nan
    date: datetime | None = None
    age: float = math.nan


@dataclass
class SessionOrder:
    """The sessions of one subject in time.

    Attributes:
        months: since the first session, by label.
        problems: reason why the time of a session is unknown, by label.
    """

    months: dict[str, int] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def order_sessions(subject: str, times: Mapping[str, SessionTime], scanned: Iterable[str]) -> SessionOrder:
    """Find the months of the sessions of a subject.

    If sessions remain of which any may be the first one, all sessions are refused: without its baseline, follow-ups
    would be taken for the whole of a subject.

    Args:
        times: by label ("ses-..." or "" for no session), for sessions without a scan as well: these may be the first.
        scanned: the labels of the sessions that have a scan.
    """
    scanned = list(scanned)
    known = _known_months(times)
    if not known:
        known = _first_of_numbered(scanned)
    months = {label: known[label] for label in scanned if label in known}
    unknown = [label for label in scanned if label not in known]
    if not unknown:
        return SessionOrder(months)
    if 0 in known.values():
        problems = {label: f"the time of its session {label or '(none)'} is unknown: {REMEDY}" for label in unknown}
        return SessionOrder(months, problems)
    names = ", ".join(label or "(none)" for label in scanned)
    problem = f"the sessions of {subject} ({names}) cannot be ordered in months: {REMEDY}"
    return SessionOrder({}, dict.fromkeys(scanned, problem))


def _known_months(times: Mapping[str, SessionTime]) -> dict[str, int]:
    known: dict[str, int] = {}
    for label, time in times.items():
        months = _label_months(label)
        if months is None and math.isfinite(time.months):
            months = round(time.months)
        if months is not None:
            known[label] = months
    by_date = {label: _date_months(label, time) for label, time in times.items()}
    by_age = {label: 12 * time.age for label, time in times.items()}
    for values in (by_date, by_age):
        _add_relative(known, {label: value for label, value in values.items() if math.isfinite(value)})
    return known


def _label_months(label: str) -> int | None:
    try:
        return parse_session(label) if label else None
    except ValueError:
        return None


def _date_months(label: str, time: SessionTime) -> float:
    date = time.date or parse_date(label)
    return (date - EPOCH).total_seconds() / 86400 * MONTHS_PER_DAY if date else math.nan


def _add_relative(known: dict[str, int], values: Mapping[str, float]) -> None:
    """Add the sessions of `values`, in months from any start, that are not before the first one."""
    if not values:
        return
    starts = [values[label] - months for label, months in known.items() if label in values]
    if not starts and known:
        return  # the two scales have no session in common
    start = min(starts or values.values())
    for label, value in values.items():
        months = round(value - start)
        if months >= 0:
            known.setdefault(label, months)


def _first_of_numbered(labels: list[str]) -> dict[str, int]:
    """The first session at 0 months: the only one, or the one with the lowest number if all are numbered."""
    if len(labels) == 1:
        return {labels[0]: 0}
    numbers = {label: parse_visit_number(label) for label in labels}
    found = [number for number in numbers.values() if number is not None]
    if len(set(found)) < len(labels):
        return {}
    return {label: 0 for label, number in numbers.items() if number == min(found)}
