"""Proves which labels of sessions are understood, and as what: months, the number of a visit, or a date."""

from datetime import datetime

import pytest

from ldae.data.sessions import parse_date, parse_session, parse_visit_number, session_label


@pytest.mark.parametrize(
    ("label", "months"),
    [
        ("12", 12), (" M012", 12), ("ses-M012", 12), ("12.0", 12), ("0", 0), (6, 6),
        ("bl", 0), ("ses-bl", 0), ("Baseline", 0), ("sc", 0), ("ses-screening", 0), ("ses-baselineYear1Arm1", 0),
        ("m06", 6), ("ses-m06", 6), ("6mo", 6), ("month-18", 18),
        ("d0000", 0), ("ses-d0365", 12), ("ses-d0015", 0), ("week26", 6),
        ("y2", 24), ("ses-Y1", 12), ("2yr", 24), ("ses-2YearFollowUpYArm1", 24),
    ],
)  # fmt: skip
def test_labels_with_a_unit_are_converted_to_months(label: str | int, months: int) -> None:
    assert parse_session(label) == months
    assert parse_session(session_label(months)) == months


@pytest.mark.parametrize("label", ["", "ses-12", "-6", "1.5", "M", "1e1", "99999", "V04", "ses-pre", "ses-20100131"])
def test_labels_without_a_unit_are_not_taken_for_months(label: str) -> None:
    with pytest.raises(ValueError, match="months"):
        parse_session(label)


@pytest.mark.parametrize(
    ("label", "number"),
    [("ses-01", 1), ("2", 2), ("V04", 4), ("ses-MR2", 2), ("wave 3", 3), ("ses-pre", None), ("ses-1a", None)],
)
def test_labels_that_count_the_visits_give_their_number(label: str, number: int | None) -> None:
    assert parse_visit_number(label) == number


@pytest.mark.parametrize(
    ("text", "date"),
    [
        ("2010-01-31", datetime(2010, 1, 31)),
        ("2010-01-31T10:20:30.5Z", datetime(2010, 1, 31, 10, 20, 30, 500000)),
        ("ses-20100131", datetime(2010, 1, 31)),
        ("1/2/2010", None),
        ("n/a", None),
        ("20101399", None),
    ],
)
def test_dates_are_read_in_iso_8601_only(text: str, date: datetime | None) -> None:
    assert parse_date(text) == date
