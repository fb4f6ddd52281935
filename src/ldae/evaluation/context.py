"""What every evaluator is handed: the trained model, the cohort, and where to write.

An evaluator is a small class chosen by config. Calling it with a `Context` yields (name, number) pairs for
metrics.json; its tables and figures go below `Context.out`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from torch import Tensor


@dataclass
class Context:
    """One cohort seen through one trained model. Row i of every array is row i of `table`.

    Attributes:
        model: an `ldae.LDAE`, or anything with its methods.
        table: one row a scan: subject, session, months, diagnosis, age, split, and what else rides along.
        volumes: row indices -> scans in model space, (B, 1, X, Y, Z), float32 in [0, 1].
        posterior: row indices -> mean and standard deviation of the latent, unscaled, each (B, C, x, y, z).
        embeddings: y of every row, (N, dim) float32.
        untrained: the same of the same encoder before any training; called only when a baseline asks for it.
        out: folder of the results.
        spacing: voxel size of the scans in model space, mm.
        seed: of the evaluators' own draws (noise, resamples, folds).
        weights: hash of the encoder's weights; frozen probes are refused on another encoder.
        regions: (row indices, label numbers) -> share of each voxel that lies in these regions of the label maps,
            (B, X, Y, Z) float32; None when the table has no label maps.
        perceptual: (x, reference) -> LPIPS, mean over the batch; None without weights.
    """

    model: Any
    table: pd.DataFrame
    volumes: Callable[[Sequence[int]], Tensor]
    posterior: Callable[[Sequence[int]], tuple[Tensor, Tensor]]
    embeddings: np.ndarray
    untrained: Callable[[], np.ndarray]
    out: Path
    spacing: tuple[float, float, float]
    seed: int = 0
    weights: str = ""
    regions: Callable[[Sequence[int], Sequence[int]], np.ndarray] | None = None
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None

    def rows(self, *splits: str) -> np.ndarray:
        """Indices of the rows that belong to any of `splits`."""
        return np.flatnonzero(self.table["split"].isin(splits).to_numpy())


class Evaluator(Protocol):
    """Yields (name, number) pairs; names become keys of metrics.json."""

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]: ...


def iterate_batches(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    """`rows` in consecutive lists of at most `size`."""
    rows = [int(row) for row in rows]
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
