"""A subsample of scans that covers as many subjects as possible."""

from collections.abc import Sequence

import numpy as np
import pandas as pd


def subsample_by_subject(rows: np.ndarray, subjects: Sequence[str], count: int | None, seed: int) -> np.ndarray:
    """At most `count` of the table rows `rows`, in table order. No subject gets a second scan before all have one.

    Args:
        rows: (N,) int64, row numbers of a table.
        subjects: the subject of every row of that table.
        count: None keeps all rows.
        seed: of the random choice between subjects and between the scans of a subject.
    """
    if count is None or len(rows) <= count:
        return rows
    shuffled = np.random.default_rng(seed).permutation(rows)
    names = pd.Series([subjects[row] for row in shuffled])
    visit = names.groupby(names).cumcount().to_numpy()  # 0 for a subject's first scan in this order, then 1, ...
    return np.sort(shuffled[np.argsort(visit, kind="stable")[:count]])
