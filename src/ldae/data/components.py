"""Principal components of volumes that need not fit into memory: a randomised SVD that reads them batch by batch.

Subspace iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4) on the volumes' covariance C:

    pass 1    Y = C W             W: random normal numbers, a column for each of L = 2 k + 32 directions
    pass 2    Y = C orth(Y)
    pass 3    T = Q' C Q          Q = orth(Y); the eigenvectors of the small T turn Q into the k components

C itself is never formed: C Q is the sum of d (d' Q) over the volumes' differences d from their mean. Memory is that of
3 L volumes, whatever their number. Up to 3 L volumes are therefore read once, and their components are exact: with D
the matrix of their differences, eigenvectors of D D' are turned into those of C = D' D / N.

All volumes count alike, also several of one subject.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldae.utils.seeding import make_generator

OVERSAMPLING = 32  # directions beyond twice the number of components: with more, the last components are more exact
RANK = 1e-6  # variance of a component over that of the first, below which it is rounding

ReadRows = Callable[[np.ndarray], Tensor]  # row numbers (B,) to volumes (B, C, X, Y, Z) float32
AddUp = Callable[[Tensor], Tensor]  # the sum of a tensor over all processes


class Components(NamedTuple):
    """Principal components of N volumes. Components that do not exist, as from number N on, are 0.

    Attributes:
        mean: (C, X, Y, Z) float32.
        directions: (k, C, X, Y, Z) float32, of length 1 and perpendicular to each other, by decreasing variance.
        variances: (k,) float32, the mean square of each score (volume - mean) . direction.
    """

    mean: Tensor
    directions: Tensor
    variances: Tensor


def _keep(tensor: Tensor) -> Tensor:
    return tensor


class ComponentsFit:
    """Fits principal components.

    The result depends on the volumes and the seed. Neither the batch size nor the number of processes changes it beyond
    rounding.

    Args:
        read: reads volumes onto the device that computes.
        rows: all row numbers; at least two.
        count: number of components, k.
        seed: of the random directions that the search starts with.
        batch: volumes that are read at a time.
        process, processes: number of this process, and of those that read a share of the rows each.
        add_up: the sum over these processes; all of them call it equally often.
        progress: whether to show a progress bar with the time that is left.
    """

    def __init__(
        self,
        read: ReadRows,
        rows: np.ndarray,
        count: int,
        seed: int,
        batch: int = 8,
        process: int = 0,
        processes: int = 1,
        add_up: AddUp = _keep,
        progress: bool = True,
    ) -> None:
        self.read, self.rows, self.count, self.seed = read, np.asarray(rows), count, seed
        self.share = self.rows[process::processes]
        self.batch, self.add_up, self.progress = batch, add_up, progress
        self.is_first = process == 0
        self.directions = 2 * count + OVERSAMPLING
        self.fits_into_memory = len(self.rows) <= 3 * self.directions

    @torch.no_grad()
    def run(self) -> Components:
        """Read the volumes once or three times, and return their components on the device."""
        origin = self.read(self.rows[:1])[0]
        self.shape = origin.shape
        if self.fits_into_memory:
            return self._exact(origin.flatten())
        mean, basis = self._sketch(origin.flatten())
        basis = self._orthonormal(self.add_up(self._covariance_times(basis, mean)))
        return self._rotate(basis, mean)

    def _exact(self, origin: Tensor) -> Components:
        """Components of all volumes in memory; every process reads all of them."""
        x = torch.cat(list(self._differences(origin, self.rows, "")))
        shift = x.mean(0)
        x -= shift
        values, vectors = torch.linalg.eigh((x @ x.T).double() / len(x))  # ascending
        found = min(self.count, len(x) - 1)
        directions = vectors.flip(1)[:, :found].T.float() @ x
        directions /= directions.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return self._finish(origin + shift, directions, values.flip(0)[:found])

    def _sketch(self, origin: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the volumes, (V,), and an orthonormal basis (V, L) of where they vary.

        Differences from `origin`, any of the volumes, are small, which keeps the sums exact.
        """
        start = torch.randn(len(origin), self.directions, generator=make_generator(self.seed, "components"))
        start = start.to(origin.device)
        total, product = torch.zeros_like(origin), torch.zeros_like(start)
        for difference in self._differences(origin, self.share, ", pass 1 of 3"):
            total += difference.sum(0)
            product += difference.T @ (difference @ start)
        mean = self.add_up(total) / len(self.rows)  # of the differences from `origin`
        product = self.add_up(product) - len(self.rows) * torch.outer(mean, mean @ start)
        return origin + mean, self._orthonormal(product)

    def _covariance_times(self, basis: Tensor, mean: Tensor) -> Tensor:
        """N C Q for Q = `basis`, (V, L): this process's part of the sum."""
        product = torch.zeros_like(basis)
        for difference in self._differences(mean, self.share, ", pass 2 of 3"):
            product += difference.T @ (difference @ basis)
        return product

    def _rotate(self, basis: Tensor, mean: Tensor) -> Components:
        """The principal directions within the span of `basis`."""
        small = torch.zeros(self.directions, self.directions, dtype=torch.float64, device=basis.device)
        for difference in self._differences(mean, self.share, ", pass 3 of 3"):
            scores = (difference @ basis).double()
            small += scores.T @ scores
        values, vectors = torch.linalg.eigh(self.add_up(small) / len(self.rows))  # ascending
        directions = (basis @ vectors.flip(1)[:, : self.count].float()).T
        return self._finish(mean, directions, values.flip(0)[: self.count])

    def _finish(self, mean: Tensor, directions: Tensor, variances: Tensor) -> Components:
        """Components of `directions` (n, V) of length 1 with these variances (n,), where n <= k."""
        exists = variances > RANK * variances[:1]
        # The sign of a component is arbitrary: its largest element is made positive.
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        result = torch.zeros(self.count, len(mean), device=mean.device)
        result[: len(directions)] = directions * largest.sign() * exists[:, None]
        sizes = torch.zeros(self.count, device=mean.device)
        sizes[: len(directions)] = (variances * exists).float()
        mean, result, sizes = (self._same_everywhere(tensor) for tensor in (mean, result, sizes))
        return Components(mean.view(self.shape), result.view(self.count, *self.shape), sizes)

    def _differences(self, mean: Tensor, rows: np.ndarray, number: str) -> Iterator[Tensor]:
        """The differences of some volumes from `mean` (V,), in batches (B, V)."""
        from tqdm import tqdm

        starts, shown = range(0, len(rows), self.batch), self.progress and self.is_first
        for start in tqdm(starts, f"principal components{number}", unit="batch", disable=not shown):
            yield self.read(rows[start : start + self.batch]).flatten(1) - mean

    def _orthonormal(self, columns: Tensor) -> Tensor:
        """An orthonormal basis (V, L) of the span of columns (V, L), the same in all processes."""
        return self._same_everywhere(torch.linalg.qr(columns).Q)

    def _same_everywhere(self, tensor: Tensor) -> Tensor:
        """The tensor of the first process, in all processes: their machines may round differently."""
        return self.add_up(tensor if self.is_first else torch.zeros_like(tensor))
