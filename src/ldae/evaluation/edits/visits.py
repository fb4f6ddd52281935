"""Triples of visits of one subject, of which the middle one is to be predicted."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Triple:
    """Three visits of one subject.

    Attributes:
        start, target, end: their rows.
        t: position of the target in time, in (0, 1).
        months: from start to end.
    """

    start: int
    target: int
    end: int
    t: float
    months: int

    @property
    def rows(self) -> list[int]:
        """The rows of the visits in order of time."""
        return [self.start, self.target, self.end]

    @property
    def nearest(self) -> int:
        """The row of the visit nearer in time to the target."""
        return self.start if self.t <= 0.5 else self.end


def find_triples(table: pd.DataFrame, rows: np.ndarray) -> list[Triple]:
    """Every start < target < end of every subject among `rows`, in table order of subjects."""
    found = []
    for _, visits in table.iloc[rows].assign(row=rows).groupby("subject", sort=False):
        visits = visits.sort_values("months")
        numbers, months = visits["row"].tolist(), visits["months"].astype(int).tolist()
        for i in range(len(numbers)):
            for k in range(i + 2, len(numbers)):
                for j in range(i + 1, k):
                    if months[i] < months[j] < months[k]:
                        apart = months[k] - months[i]
                        t = (months[j] - months[i]) / apart
                        found.append(Triple(numbers[i], numbers[j], numbers[k], t, apart))
    return found


def spread_over_subjects(triples: Sequence[Triple], subjects: Sequence[str], most: int | None) -> list[Triple]:
    """At most `most` of the triples, in their order: one of each subject, then a second one, and so on.

    Which of its triples a subject begins with depends on its place, so that few triples have different gaps.

    Args:
        subjects: of each triple.
        most: None: all of them.
    """
    of_subject: dict[str, list[int]] = {}
    for number, subject in enumerate(subjects):
        of_subject.setdefault(str(subject), []).append(number)
    ranked = [
        (round_, place, numbers[(place + round_) % len(numbers)])
        for place, numbers in enumerate(of_subject.values())
        for round_ in range(len(numbers))
    ]
    return [triples[number] for number in sorted(number for *_, number in sorted(ranked)[:most])]
