"""Pairs of visits: at random, a training scan is paired with another visit of the same subject."""

from collections.abc import Sequence

import numpy as np
import torch

from ldae.utils.seeding import make_generator


class OtherVisits:
    """Replaces a share of the samples by another visit of their subject.

    Args:
        subjects: subject of every row of the table.
        rows: rows that may be chosen, such as those of the training split.
        share: probability that a sample is replaced, if its subject has another visit among `rows`.
        seed: the choice for a sample depends on (seed, key of the sample) alone.
    """

    def __init__(self, subjects: Sequence[str], rows: np.ndarray, share: float, seed: int) -> None:
        self.subjects = np.asarray(subjects)
        self.share = share
        self.seed = seed
        chosen = self.subjects[rows]
        self.visits = {subject: rows[chosen == subject] for subject in dict.fromkeys(chosen)}

    def choose(self, rows: np.ndarray, keys: Sequence[int]) -> np.ndarray:
        """For each of the rows (B,) itself or the row of another visit of its subject, (B,)."""
        if not self.share:
            return rows
        chosen = rows.copy()
        for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
            visits = self.visits[self.subjects[row]]
            others = visits[visits != row]
            chance, which = torch.rand(2, generator=make_generator(self.seed, "train/visit", int(key))).tolist()
            if len(others) and chance < self.share:
                chosen[i] = others[int(which * len(others))]
        return chosen
