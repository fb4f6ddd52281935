"""Principal components of scans that are read in batches, because all of them together may not fit into memory.

Up to `MAX_EXACT` scans, only the inner products of the scans are kept: the components of any of them are exact and cost
no further reading. Beyond, the leading ones come from three passes over the scans (ldae.data.components).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldae.data.components import ComponentsFit
from ldae.evaluation.context import iterate_batches

MAX_EXACT = 2048  # scans
MAX_BATCH = 256 << 20  # bytes of float64 that are read at a time
MAX_KEPT = 1 << 30  # bytes of float32 that are kept in memory instead of being read again
ReadRows = Callable[[Sequence[int]], np.ndarray]  # rows -> (n, D) float32


class ScanMatrix:
    """Scans as the rows of a matrix (N, D) that is read in batches.

    Args:
        read: the flattened scans of some rows, (n, D).
        count: N.
    """

    def __init__(self, read: ReadRows, count: int) -> None:
        self._read, self.count = read, count
        self.features = read([0]).shape[1] if count else 0
        self._kept: np.ndarray | None = None
        self._products: np.ndarray | None = None

    @property
    def batch_size(self) -> int:
        """Scans that are read at a time."""
        return max(1, min(64, MAX_BATCH // (8 * max(self.features, 1))))

    def batches(self, rows: Sequence[int]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Positions within `rows`, and these scans, (n, D) float64."""
        for positions in iterate_batches(range(len(rows)), self.batch_size):
            yield positions, self._take([int(rows[position]) for position in positions]).astype(np.float64)

    def read_tensor(self, rows: np.ndarray) -> Tensor:
        """The scans `rows`, (n, D) float32."""
        return torch.from_numpy(np.asarray(self._take(rows), np.float32))

    def _take(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        if 4 * self.count * self.features > MAX_KEPT:
            return self._read(rows)
        if self._kept is None:
            parts = [self._read(part) for part in iterate_batches(range(self.count), self.batch_size)]
            self._kept = np.concatenate(parts).astype(np.float32)
        return self._kept[list(rows)]

    def inner_products(self) -> np.ndarray:
        """The inner product of each scan with each other, (N, N) float64."""
        if self._products is None:
            found = np.zeros((self.count, self.count))
            for first, x in self.batches(range(self.count)):
                for second, other in self.batches(range(first[-1] + 1)):  # the rest by symmetry
                    found[np.ix_(first, second)] = x @ other.T
                    found[np.ix_(second, first)] = found[np.ix_(first, second)].T
            self._products = found
        return self._products

    def combine(self, rows: Sequence[int], weights: np.ndarray) -> np.ndarray:
        """The sums of the scans `rows`, weighted by each column of `weights` (n, K): (K, D)."""
        return sum((weights[positions].T @ x for positions, x in self.batches(rows)), np.zeros(()))

    def project(self, rows: Sequence[int], mean: np.ndarray, axes: np.ndarray) -> np.ndarray:
        """Scans less `mean` (D,) along axes (D, K): (n, K)."""
        return np.concatenate([(x - mean) @ axes for _, x in self.batches(rows)])


class Components(Protocol):
    """Principal components, in descending order, that were fitted on some scans of a `ScanMatrix`.

    Attributes:
        count: how many there are, K.
    """

    count: int

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Of these scans, (n, K)."""
        ...

    def unfold(self, slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(mean, vector), (D,) each, so that scores @ slopes = (scan - mean) @ vector."""
        ...


class ExactComponents:
    """All components of the scans `rows`, from inner products."""

    def __init__(self, matrix: ScanMatrix, rows: np.ndarray) -> None:
        self._matrix, self._rows = matrix, rows
        products = matrix.inner_products()[np.ix_(rows, rows)]
        self._mean = products.mean(0)
        squares, vectors = np.linalg.eigh(self._centre(products))
        squares, vectors = squares[::-1], vectors[:, ::-1]
        kept = squares > 1e-10 * np.trace(products)
        self._weights = vectors[:, kept] / np.sqrt(squares[kept])
        self.count = int(kept.sum())

    def _centre(self, products: np.ndarray) -> np.ndarray:
        """Inner products (n, N) with the fitting scans, of scans less the fitting scans' mean."""
        return products - products.mean(1, keepdims=True) - self._mean + self._mean.mean()

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Of these scans, (n, K)."""
        return self._centre(self._matrix.inner_products()[np.ix_(rows, self._rows)]) @ self._weights

    def unfold(self, slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Components`."""
        weights = self._weights @ slopes
        equal = np.full(len(self._rows), 1 / len(self._rows))
        mean, vector = self._matrix.combine(self._rows, np.stack([equal, weights - weights.mean()], 1))
        return mean, vector


class LeadingComponents:
    """The leading `width` components of the scans `rows`, from passes over them (ldae.data.components)."""

    def __init__(self, matrix: ScanMatrix, rows: np.ndarray, width: int, seed: int) -> None:
        found = ComponentsFit(matrix.read_tensor, rows, width, seed, matrix.batch_size).run()
        self._mean, self._axes = found.mean.double().numpy(), found.directions.double().numpy().T
        self._scores = matrix.project(range(matrix.count), self._mean, self._axes)
        self.count = width

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Of these scans, (n, width)."""
        return self._scores[rows]

    def unfold(self, slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Components`."""
        return self._mean, self._axes @ slopes
