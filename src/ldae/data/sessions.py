"""Labels of sessions: the months since the first visit, the number of a visit, or a date.

Preprocessing and training read labels with these functions, so that they agree on every one. BIDS, ADNI (`bl`, `m06`,
`sc`), OASIS-3 (`d0365`) and ABCD (`2YearFollowUpYArm1`) write them differently.
"""

import re
from datetime import datetime

MONTHS_PER_DAY = 12 / 365.25
_BASELINE = {"bl", "baseline", "base", "sc", "scr", "scmri", "screening", "baselineyear1arm1"}
_MONTHS_PER_UNIT = {
    **dict.fromkeys(("d", "day", "days"), MONTHS_PER_DAY),
    **dict.fromkeys(("wk", "wks", "week", "weeks"), 7 * MONTHS_PER_DAY),
    **dict.fromkeys(("m", "mo", "mon", "mth", "month", "months"), 1.0),
    **dict.fromkeys(("y", "yr", "yrs", "year", "years", "yearfollowupyarm1"), 12.0),
}
_PREFIX = re.compile(r"ses-", re.IGNORECASE)
_BARE_MONTHS = re.compile(r"(\d{1,4})(?:\.0+)?")
_UNIT_FIRST = re.compile(r"(?P<unit>[a-z]+)[ _-]?(?P<number>\d{1,5})")
_NUMBER_FIRST = re.compile(r"(?P<number>\d{1,5})[ _-]?(?P<unit>[a-z][a-z0-9]*)")
_VISIT = re.compile(r"[a-z]*[ _-]?(\d{1,4})", re.IGNORECASE)


def parse_session(value: str | int) -> int:
    """Months since the first visit, from the label of a session.

    Read are 12 and 12.0 (months), M012, m06, month6 and 6mo, y2 and 2yr, d0365 (days) and week4, each with or without
    `ses-` and in any case; bl, baseline, sc and screening are 0. Days and weeks are rounded to months of 30.44 days.

    Raises:
        ValueError: it is written in another way. A number after `ses-` counts the visits: see `parse_visit_number`.
    """
    text = str(value).strip()
    bare = _BARE_MONTHS.fullmatch(text)
    if bare:
        return int(bare[1])
    label = _PREFIX.sub("", text, count=1).lower()
    if label in _BASELINE:
        return 0
    match = _UNIT_FIRST.fullmatch(label) or _NUMBER_FIRST.fullmatch(label)
    if match is None or match["unit"] not in _MONTHS_PER_UNIT:
        raise ValueError(f"session {value!r} is not in months: write it as 12, M012, ses-M012 or bl")
    return round(int(match["number"]) * _MONTHS_PER_UNIT[match["unit"]])


def parse_bare_number(text: str) -> int | None:
    """The whole number that a text is, written as 2 or 2.0; None if it is something else."""
    match = _BARE_MONTHS.fullmatch(text.strip())
    return int(match[1]) if match else None


def session_label(months: int) -> str:
    """The BIDS label of a session: "ses-M012" for 12 months."""
    return f"ses-M{months:03d}"


def parse_visit_number(label: str) -> int | None:
    """The number in a label that counts the visits, such as ses-01, V04, MR2 or wave3; None if there is none."""
    match = _VISIT.fullmatch(_PREFIX.sub("", label.strip(), count=1))
    return int(match[1]) if match else None


def parse_date(text: str) -> datetime | None:
    """A date in ISO 8601 such as 2010-01-31, 2010-01-31T10:00:00 or ses-20100131; None for anything else.

    The time zone is dropped. Dates of other orders, such as 1/2/2010, are ambiguous and give None.
    """
    label = _PREFIX.sub("", text.strip(), count=1)
    if not re.match(r"\d{4}-?\d{2}-?\d{2}", label):
        return None
    try:
        return datetime.fromisoformat(label).replace(tzinfo=None)
    except ValueError:
        return None
