"""Maps of CSF, grey and white matter of a brain scan, from a mixture of three Gaussians (Ashburner & Friston 1997).

The mixture is fitted by expectation and maximisation to the histogram of the brain's intensities, so that it costs the
same whatever the number of voxels. No atlas is needed: the scan's own intensities say which tissue is which, and a
lesion, which looks like another tissue, is counted as that.
"""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

TISSUES = ("csf", "grey", "white")  # from dark to bright, as in a T1-weighted scan

MIN_VOXELS = 200  # of the brain
MIN_LEVELS = 8  # different intensities, in bins of the histogram
MIN_SHARE = 0.01  # of the brain's voxels, for each tissue
# Distance of two neighbouring means over the root mean square of their standard deviations. In 149 scans of one site
# the smallest was 1.6; three Gaussians that are fitted to a single one are 1.0 to 1.2 apart.
NOTED_DISTANCE, MIN_DISTANCE = 1.2, 0.3

Histogram = tuple[np.ndarray, np.ndarray]  # centres of the bins, and the share of the voxels in each; (N,) each


class TissuesNotFound(ValueError):
    """A scan has no three tissues; the message says why, in one line."""


@dataclass(frozen=True)
class TissueMaps:
    """Maps of one scan.

    Attributes:
        values: (channels, X, Y, Z) float32 in [0, 1], 0 outside of the brain.
        notes: remarks on what is unusual.
    """

    values: np.ndarray
    notes: tuple[str, ...] = ()


class TissueMaker(Protocol):
    """Makes the maps of tissues of a scan.

    Attributes:
        channels: number of maps.
    """

    channels: int

    def parameters(self) -> dict[str, Any]:
        """Everything that the maps depend on besides the scan, as plain values."""
        ...

    def __call__(self, data: np.ndarray) -> TissueMaps:
        """Maps of a brain (X, Y, Z) whose background is 0, without skull.

        Raises:
            TissuesNotFound: it has no three tissues.
        """
        ...


@dataclass(frozen=True)
class Gaussians:
    """A mixture of three Gaussians of the brain's intensities, from dark to bright.

    Attributes:
        means, sds, shares: (3,) each; the shares sum to 1.
    """

    means: np.ndarray
    sds: np.ndarray
    shares: np.ndarray

    def posterior(self, values: np.ndarray) -> np.ndarray:
        """Probability of each tissue at the intensities `values` (N,), (3, N).

        Beyond the darkest and the brightest mean it stays as it is there. Otherwise the widest Gaussian would win on
        both sides, and the brightest voxels of white matter would be CSF.
        """
        inside = np.clip(values, self.means[0], self.means[-1])
        likelihood = np.exp(_log_density(inside, self.means, self.sds, self.shares))
        return likelihood / likelihood.sum(0)

    def distances(self) -> np.ndarray:
        """Distances between neighbouring means over the root mean square of both standard deviations, (2,)."""
        return np.diff(self.means) / np.sqrt((self.sds[1:] ** 2 + self.sds[:-1] ** 2) / 2)


@dataclass(frozen=True)
class Mixture:
    """Probabilities of CSF, grey and white matter: three maps, which sum to 1 in the brain.

    Args:
        bins: of the histogram.
        rounds: of expectation and maximisation, at most.
    """

    bins: int = 512
    rounds: int = 500

    channels = 3

    def parameters(self) -> dict[str, Any]:
        """See TissueMaker."""
        return {"kind": type(self).__qualname__, "version": 1, **asdict(self)}

    def __call__(self, data: np.ndarray) -> TissueMaps:
        """See TissueMaker."""
        brain = data > 0
        values = data[brain].astype(np.float64)
        gaussians = fit_gaussians(values, self.bins, self.rounds)
        # Probabilities are computed for 4096 intensities and interpolated: exponentials of every voxel would take
        # longer than all the rest.
        levels = np.linspace(gaussians.means[0], gaussians.means[-1], 4096)
        maps = np.zeros((3, *data.shape), np.float32)
        for tissue, probability in zip(maps, gaussians.posterior(levels), strict=True):
            tissue[brain] = np.interp(values, levels, probability)
        return TissueMaps(maps, describe(gaussians))


@dataclass(frozen=True)
class Ramps:
    """Two maps that grow linearly, from 0 at the mean of CSF to 1 at that of grey matter, and from there to white.

    Args:
        bins, rounds: of the mixture whose means are used, see Mixture.
    """

    bins: int = 512
    rounds: int = 500

    channels = 2

    def parameters(self) -> dict[str, Any]:
        """See TissueMaker."""
        return {"kind": type(self).__qualname__, "version": 1, **asdict(self)}

    def __call__(self, data: np.ndarray) -> TissueMaps:
        """See TissueMaker."""
        gaussians = fit_gaussians(data[data > 0].astype(np.float64), self.bins, self.rounds)
        steps = zip(gaussians.means[:-1], gaussians.means[1:], strict=True)
        maps = [np.clip((data - low) / (high - low), 0, 1) for low, high in steps]
        return TissueMaps(np.stack(maps).astype(np.float32), describe(gaussians))


def describe(gaussians: Gaussians) -> tuple[str, ...]:
    """A remark if the tissues are hardly distinct."""
    distances = gaussians.distances()
    if distances.min() >= NOTED_DISTANCE:
        return ()
    place = int(distances.argmin())
    pair = f"{TISSUES[place]} and {TISSUES[place + 1]}"
    return (f"its {pair} are hardly distinct: their means are {distances[place]:.2f} standard deviations apart",)


def fit_gaussians(values: np.ndarray, bins: int = 512, rounds: int = 500) -> Gaussians:
    """Fit three Gaussians to the intensities of a brain.

    Args:
        values: (N,) float64, of the brain's voxels.
        bins: of the histogram, which spans all but the darkest and brightest thousandth.
        rounds: at most.

    Raises:
        TissuesNotFound: there are too few voxels or intensities, or a class vanishes or coincides with another.
    """
    if len(values) < MIN_VOXELS:
        raise TissuesNotFound(f"no three tissues: the brain has {len(values)} voxels, {MIN_VOXELS} are needed")
    centres, share = _histogram(values, bins)
    levels = int((share > 0).sum())
    if levels < MIN_LEVELS:
        raise TissuesNotFound(f"no three tissues: the brain has {levels} intensities, {MIN_LEVELS} are needed")
    gaussians = _maximise(centres, share, _start(centres, share), rounds)
    shares, distances = gaussians.shares, gaussians.distances()
    if shares.min() < MIN_SHARE:
        tissue = TISSUES[int(shares.argmin())]
        raise TissuesNotFound(f"no three tissues: {tissue} would be {shares.min():.1%} of the brain")
    if not distances.min() > MIN_DISTANCE:
        raise TissuesNotFound(f"no three tissues: two are {distances.min():.2f} standard deviations apart")
    return gaussians


def _histogram(values: np.ndarray, bins: int) -> Histogram:
    """Darker and brighter voxels than the histogram spans are counted in its first and last bin."""
    low, high = np.percentile(values, (0.1, 99.9))
    if not high > low:
        raise TissuesNotFound("no three tissues: the brain has one intensity")
    counts, edges = np.histogram(np.clip(values, low, high), bins, range=(low, high))
    return (edges[1:] + edges[:-1]) / 2, counts / counts.sum()


def _start(centres: np.ndarray, share: np.ndarray) -> Gaussians:
    """The three parts of the histogram with the smallest variance within them (Otsu 1979), the best of all divisions.

    EM only finds the nearest maximum, but from here all scans of a site are divided in the same way.
    """
    coarse = max(1, len(centres) // 64)
    edges = np.append(np.arange(0, len(centres), coarse), len(centres))
    mass = np.append(0, np.cumsum(share))[edges]
    moment = np.append(0, np.cumsum(share * centres))[edges]

    def explained(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        part = mass[last] - mass[first]
        return np.divide((moment[last] - moment[first]) ** 2, part, out=np.zeros(len(part)), where=part > 0)

    first, second = (index + 1 for index in np.triu_indices(len(edges) - 2, 1))
    ends = np.zeros_like(first), np.full_like(first, len(edges) - 1)
    score = explained(ends[0], first) + explained(first, second) + explained(second, ends[1])
    best = int(score.argmax())
    parts = np.split(np.arange(len(centres)), edges[[first[best], second[best]]])
    responsibility = np.zeros((3, len(centres)))
    for row, part in zip(responsibility, parts, strict=True):
        row[part] = share[part]
    return _estimate(centres, responsibility)


def _maximise(centres: np.ndarray, share: np.ndarray, gaussians: Gaussians, rounds: int) -> Gaussians:
    """Expectation and maximisation until the likelihood per voxel grows by less than 1e-7."""
    before = -np.inf
    for _ in range(rounds):
        density = _log_density(centres, gaussians.means, gaussians.sds, gaussians.shares)
        largest = density.max(0)
        likelihood = np.exp(density - largest)
        total = likelihood.sum(0)
        mean = float((share * (largest + np.log(total))).sum())
        if not mean - before > 1e-7:
            break
        before, gaussians = mean, _estimate(centres, likelihood / total * share)
        if gaussians.shares.min() < MIN_SHARE:
            break
    order = np.argsort(gaussians.means)
    return Gaussians(gaussians.means[order], gaussians.sds[order], gaussians.shares[order])


def _estimate(centres: np.ndarray, responsibility: np.ndarray) -> Gaussians:
    """The Gaussians that are most likely if tissue k has the share `responsibility[k]` (3, N) of the histogram."""
    shares = np.maximum(responsibility.sum(1), 1e-12)
    means = responsibility @ centres / shares
    variances = (responsibility * (centres - means[:, None]) ** 2).sum(1) / shares
    # At least one bin wide: without a bound, a Gaussian can collapse onto one level of a quantised scan.
    smallest = (_level_distance(centres, responsibility.sum(0)) / 2) ** 2
    return Gaussians(means, np.sqrt(np.maximum(variances, smallest)), shares / shares.sum())


def _level_distance(centres: np.ndarray, share: np.ndarray) -> float:
    """Median distance between neighbouring intensities that occur."""
    return float(np.median(np.diff(centres[share > 0])))


def _log_density(values: np.ndarray, means: np.ndarray, sds: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Logarithm of share times normal density of each tissue, (3, N)."""
    scaled = (values - means[:, None]) / sds[:, None]
    return np.log(shares / sds)[:, None] - scaled**2 / 2
