"""The features of a predictor as blocks of one kind each, and how a block is prepared for the penalty.

A block is imputed, centred, reduced to principal components if it has widths, and scaled (scaling.py). All of that is
fitted on the rows of one fold, and folded into the arrays of a LinearModel at the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldae.evaluation.probes.scaling import Scaling

EXACT = 1_000_000  # up to this many values, principal components are exact; beyond, randomised with a fixed seed


@dataclass(frozen=True)
class Block:
    """Features of one kind.

    Attributes:
        values: (N, D), NaN where missing.
        widths: numbers of principal components to choose from; None keeps the features as they are.
        are_components: the features already are principal components, in descending order: the leading ones are taken.
        are_columns: the features are columns of a table, in different units.
    """

    values: np.ndarray
    widths: Sequence[int] | None = None
    are_components: bool = False
    are_columns: bool = False

    def take(self, rows: np.ndarray) -> "Block":
        """The same features of some rows."""
        return Block(self.values[rows], self.widths, self.are_components, self.are_columns)

    def usable_widths(self) -> list[int]:
        """The widths that this many rows and features allow, ascending; empty without widths."""
        count = self.values.shape[1]
        limit = count if self.are_components else min(len(self.values) - 1, count)
        return sorted({min(width, limit) for width in self.widths or ()})


@dataclass(frozen=True)
class Preparation:
    """What is done to one block: ((filled - mean) @ axes) / divisors.

    Attributes:
        mean: (D,), also what a missing feature is set to.
        axes: (D, W) principal axes, or None.
        divisors: (W,), or (D,) without axes.
    """

    mean: np.ndarray
    axes: np.ndarray | None
    divisors: np.ndarray

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Values (N, D) prepared, (N, W)."""
        centred = np.where(np.isnan(values), 0.0, values - self.mean)
        return (centred if self.axes is None else centred @ self.axes) / self.divisors

    def narrowed(self, block: Block, width: int, scaling: Scaling) -> "Preparation":
        """The same with the leading `width` axes only; the components of one PCA are those of every smaller one."""
        axes = self.axes[:, :width]
        reduced = Preparation(self.mean, axes, np.ones(axes.shape[1]))(block.values)
        return Preparation(self.mean, axes, scaling.divide_features(reduced))


def prepare(block: Block, width: int | None, scaling: Scaling, seed: int) -> Preparation:
    """The preparation fitted on the rows of `block`, with its leading `width` principal components; None: without."""
    values = np.asarray(block.values, np.float64)
    missing = np.isnan(values)
    counts = np.maximum((~missing).sum(0), 1)
    mean = np.where(missing, 0.0, values).sum(0) / counts  # 0 for a column without any value
    filled = np.where(missing, mean, values)
    if width is None:
        divisors = scaling.divide_columns(filled) if block.are_columns else scaling.divide_features(filled)
        return Preparation(mean, None, divisors)
    axes = np.eye(values.shape[1], width) if block.are_components else principal_axes(filled - mean, width, seed)
    return Preparation(mean, axes, scaling.divide_features((filled - mean) @ axes))


def principal_axes(centred: np.ndarray, width: int, seed: int) -> np.ndarray:
    """The leading `width` principal axes of centred rows (N, D), orthonormal, (D, width)."""
    from sklearn.utils.extmath import randomized_svd

    if centred.size <= EXACT:
        return np.linalg.svd(centred, full_matrices=False)[2][:width].T
    return randomized_svd(centred, width, n_iter=7, random_state=seed)[2].T


def rotate_into_span(values: np.ndarray) -> np.ndarray:
    """Orthonormal axes (D, R) of the span of rows (N, D), N < D.

    A penalty on the squared length of the slopes is the same in these coordinates and takes less arithmetic.
    """
    squares, vectors = np.linalg.eigh(values @ values.T)
    kept = squares >= 1e-10 * squares[-1]  # all of them if every value is 0
    lengths = np.sqrt(np.maximum(squares[kept], np.finfo(np.float64).tiny))
    return values.T @ (vectors[:, kept] / lengths)
