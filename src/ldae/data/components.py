"""Principal components of volumes that do not fit into memory: a randomised SVD that reads them batch by batch.

Subspace iteration (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithm 4.4) on the volumes' covariance C:

    pass 1    Y = C W             W: random normal numbers, a column for each of L > k directions
    pass 2    Y = C orth(Y)       left out where L directions hold all volumes, so that the result is exact
    pass 3    T = Q' C Q          Q = orth(Y); the eigenvectors of the small T turn Q into the components

Memory is that of 3 L volumes, whatever their number. C itself is never formed: C Q is the sum of d (d' Q) over the
volumes' differences d from their mean. All volumes count alike, also several of one subject.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldae.utils.seeding import make_generator

OVERSAMPLING = 32  # directions beyond twice the number of components: with more, the last components are more exact

ReadRows = Callable[[np.ndarray], Tensor]  # row numbers (B,) to volumes (B, C, X, Y, Z) float32
AddUp = Callable[[Tensor], Tensor]  # the sum of a tensor over all processes


class Components(NamedTuple):
    """Principal components of N volumes. Components that do not exist, from number N on, are 0.

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
        self.directions = min(2 * count + OVERSAMPLING, len(self.rows))

    @torch.no_grad()
    def run(self) -> Components:
        """Read the volumes two or three times, and return their components on the device."""
        origin = self.read(self.rows[:1])[0]  # differences from any of the volumes are small, which keeps sums exact
        self.shape = origin.shape
        mean, basis = self._sketch(origin.flatten())
        if len(self.rows) > self.directions:
            basis = self._orthonormal(self.add_up(self._covariance_times(basis, mean, "2 of 3")))
        return self._rotate(basis, mean, "3 of 3" if len(self.rows) > self.directions else "2 of 2")

    def _sketch(self, origin: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of the volumes, (V,), and an orthonormal basis (V, L) of where they vary."""
        start = torch.randn(len(origin), self.directions, generator=make_generator(self.seed, "components"))
        start = start.to(origin.device)
        total, product = torch.zeros_like(origin), torch.zeros_like(start)
        for difference in self._differences(origin, f"1 of {3 if len(self.rows) > self.directions else 2}"):
            total += difference.sum(0)
            product += difference.T @ (difference @ start)
        mean = self.add_up(total) / len(self.rows)  # of the differences from `origin`
        product = self.add_up(product) - len(self.rows) * torch.outer(mean, mean @ start)
        return origin + mean, self._orthonormal(product)

    def _covariance_times(self, basis: Tensor, mean: Tensor, number: str) -> Tensor:
        """N C Q for Q = `basis`, (V, L): this process's part of the sum."""
        product = torch.zeros_like(basis)
        for difference in self._differences(mean, number):
            product += difference.T @ (difference @ basis)
        return product

    def _rotate(self, basis: Tensor, mean: Tensor, number: str) -> Components:
        """The principal directions within the span of `basis`."""
        small = torch.zeros(self.directions, self.directions, dtype=torch.float64, device=basis.device)
        for difference in self._differences(mean, number):
            scores = (difference @ basis).double()
            small += scores.T @ scores
        values, vectors = torch.linalg.eigh(self.add_up(small) / len(self.rows))  # ascending
        found = min(self.count, len(self.rows) - 1)
        directions = (basis @ vectors.flip(1)[:, :found].float()).T  # (found, V)
        # The sign of a component is arbitrary: its largest element is made positive.
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        directions = directions * largest.sign()
        result = torch.zeros(self.count, len(mean), device=basis.device)
        result[:found] = directions
        variances = torch.zeros(self.count, device=basis.device)
        variances[:found] = values.flip(0)[:found].clamp(min=0).float()
        directions, variances = self._same_everywhere(result), self._same_everywhere(variances)
        return Components(mean.view(self.shape), directions.view(self.count, *self.shape), variances)

    def _differences(self, mean: Tensor, number: str) -> Iterator[Tensor]:
        """The differences of this process's volumes from `mean` (V,), in batches (B, V)."""
        from tqdm import tqdm

        starts = range(0, len(self.share), self.batch)
        label = f"principal components, pass {number}"
        for start in tqdm(starts, label, unit="batch", disable=not (self.progress and self.is_first)):
            yield self.read(self.share[start : start + self.batch]).flatten(1) - mean

    def _orthonormal(self, columns: Tensor) -> Tensor:
        """An orthonormal basis (V, L) of the span of columns (V, L), the same in all processes."""
        return self._same_everywhere(torch.linalg.qr(columns).Q)

    def _same_everywhere(self, tensor: Tensor) -> Tensor:
        """The tensor of the first process, in all processes: their machines may round differently."""
        return self.add_up(tensor if self.is_first else torch.zeros_like(tensor))
