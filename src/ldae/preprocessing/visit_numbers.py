"""Whether bare numbers in a column of sessions are months, as in the table of training, or count the visits.

Numbers are months unless the dates or ages of the same table show that they cannot be: sessions 1 and 2 of a subject
that are two years apart.
"""

import logging
import math
from collections import defaultdict
from itertools import pairwise

from ldae.data.columns import find_columns
from ldae.data.delimited import TextTable
from ldae.data.sessions import MONTHS_PER_DAY, parse_bare_number, parse_date
from ldae.data.values import parse_age

log = logging.getLogger(__name__)

# Months by which the time between two sessions may differ from their numbers: a date is exact, ages may be whole years.
TOLERANCE = {"date": 6.0, "age": 13.0}


def numbers_count_visits(table: TextTable, subject: str, session: str) -> bool:
    """Whether the numbers in the column `session` count the visits, by most of the pairs of sessions with known times.

    Args:
        subject, session: names of the columns; "" if the table has none.
    """
    if not subject or not session:
        return False
    for role, tolerance in TOLERANCE.items():
        for column in find_columns(table.header, role):
            times: dict[str, list[tuple[int, float]]] = defaultdict(list)
            for row in table.rows:
                number, time = parse_bare_number(row.cells[session]), _read_months(role, row.cells[column])
                if number is not None and math.isfinite(time):
                    times[row.cells[subject]].append((number, time))
            pairs = [pair for found in times.values() for pair in pairwise(sorted(found))]
            # More time than stated: with one age for all visits of a subject, there is less.
            apart = [pair for pair in pairs if (pair[1][1] - pair[0][1]) - (pair[1][0] - pair[0][0]) > tolerance]
            if 2 * len(apart) > len(pairs):
                (number, time), (later, later_time) = apart[0]
                log.warning(
                    "%s: column '%s' counts the visits and is not in months: by column '%s', sessions %d and %d of one "
                    "subject are %.0f months apart",
                    *(table.path, session, column, number, later, later_time - time),
                )
                return True
    return False


def _read_months(role: str, text: str) -> float:
    """Months of a date or an age from any start, NaN if it is not known."""
    if role == "date":
        date = parse_date(text)
        return date.toordinal() * MONTHS_PER_DAY if date else math.nan
    try:
        return 12 * parse_age(text).years
    except ValueError:
        return math.nan
