"""A mixture of three tissues, fitted to the histogram of a brain's intensities by expectation and maximisation.

A component of the mixture is a pure tissue, or a given division of a voxel between two that are neighbours in
intensity; its mean is then the same division of their means. Where voxels are large, few of them are pure, and the
divided ones tell the means of the pure ones (Santago and Gage 1993, doi 10.1109/42.241892; Shattuck et al. 2001, doi
10.1006/nimg.2000.0730).
"""

from dataclasses import dataclass

import numpy as np

TISSUES = ("csf", "grey", "white")  # from dark to bright, as in a T1-weighted scan

MIN_VOXELS = 200  # of the brain
MIN_LEVELS = 8  # different intensities, in bins of the histogram
MIN_SHARE = 0.01  # of the brain, for each tissue
TOLERANCE = 1e-6  # of the mean logarithm of the likelihood of a voxel
# Distance of two neighbouring means over the root mean square of their standard deviations. With shared voxels, three
# tissues that are fitted to one Gaussian are 1.5 to 1.6 apart, and to two Gaussians 0.4.
NOTED_DISTANCE, MIN_DISTANCE = 1.7, 0.5


class TissuesNotFound(ValueError):
    """A scan has no three tissues; the message says why, in one line."""


@dataclass(frozen=True)
class Divisions:
    """The components of a mixture.

    Attributes:
        fractions: (K, 3), of each tissue in a voxel of each component.
        group: (K,) components of one group have the same share.
        one_sd: whether all tissues have one standard deviation, that of noise and bias field.
    """

    fractions: np.ndarray
    group: np.ndarray
    one_sd: bool

    @classmethod
    def pure(cls) -> "Divisions":
        """Three tissues, each with its own standard deviation."""
        return cls(np.eye(3), np.arange(3), one_sd=False)

    @classmethod
    def shared(cls, steps: int) -> "Divisions":
        """Three tissues, and voxels that two of them share, in `steps` equally likely divisions."""
        rows = [*np.eye(3)]
        for step in range(1, steps + 1):
            part = step / (steps + 1)
            rows += [[1 - part, part, 0], [0, 1 - part, part]]
        return cls(np.array(rows, np.float64), np.array([0, 1, 2, *[3, 4] * steps]), one_sd=True)


@dataclass(frozen=True)
class TissueMixture:
    """A fitted mixture.

    Attributes:
        divisions: its components.
        means, sds: (3,) intensities of the pure tissues, from dark to bright.
        weights: (K,) shares of the components, which sum to 1.
    """

    divisions: Divisions
    means: np.ndarray
    sds: np.ndarray
    weights: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """Share of the brain that each tissue fills, (3,)."""
        return self.weights @ self.divisions.fractions

    def fractions_at(self, values: np.ndarray) -> np.ndarray:
        """Expected fraction of each tissue in voxels of the intensities `values` (N,), (3, N).

        Beyond the darkest and the brightest mean it stays as it is there. Otherwise the widest Gaussian would win on
        both sides, and the brightest voxels of white matter would be CSF.
        """
        density = self.log_density(np.clip(values, self.means[0], self.means[-1]))
        likelihood = np.exp(density - density.max(0))
        return self.divisions.fractions.T @ (likelihood / likelihood.sum(0))

    def distances(self) -> np.ndarray:
        """Distances between neighbouring means over the root mean square of both standard deviations, (2,)."""
        return np.diff(self.means) / np.sqrt((self.sds[1:] ** 2 + self.sds[:-1] ** 2) / 2)

    def describe(self) -> tuple[str, ...]:
        """A remark if two tissues are hardly distinct."""
        distances = self.distances()
        if distances.min() >= NOTED_DISTANCE:
            return ()
        place = int(distances.argmin())
        pair = f"{TISSUES[place]} and {TISSUES[place + 1]}"
        return (f"its {pair} are hardly distinct: their means are {distances[place]:.2f} standard deviations apart",)

    def log_density(self, values: np.ndarray) -> np.ndarray:
        """Logarithm of weight times density of each component at `values` (N,), up to a constant, (K, N)."""
        fractions = self.divisions.fractions
        means, variances = fractions @ self.means, fractions @ self.sds**2
        scaled = (values - means[:, None]) ** 2 / variances[:, None]
        return np.log(self.weights / np.sqrt(variances))[:, None] - scaled / 2


def fit_tissues(values: np.ndarray, divisions: Divisions, bins: int = 512, rounds: int = 300) -> TissueMixture:
    """Fit a mixture to the intensities of a brain.

    Args:
        values: (N,) float64, of the brain's voxels.
        bins: of the histogram, which spans all but the darkest and brightest thousandth. The cost does not depend on N.
        rounds: of expectation and maximisation, at most.

    Raises:
        TissuesNotFound: there are too few voxels or intensities, or a tissue vanishes or coincides with another.
    """
    if len(values) < MIN_VOXELS:
        raise TissuesNotFound(f"no three tissues: the brain has {len(values)} voxels, {MIN_VOXELS} are needed")
    centres, share = _histogram(values, bins)
    levels = int((share > 0).sum())
    if levels < MIN_LEVELS:
        raise TissuesNotFound(f"no three tissues: the brain has {levels} intensities, {MIN_LEVELS} are needed")
    mixture = _maximise(centres, share, _start(centres, share, divisions), rounds)
    if not np.diff(mixture.means).min() > 0:
        raise TissuesNotFound("no three tissues: two have the same intensity")
    shares, distances = mixture.shares, mixture.distances()
    if not shares.min() >= MIN_SHARE:
        tissue = TISSUES[int(shares.argmin())]
        raise TissuesNotFound(f"no three tissues: {tissue} would be {shares.min():.1%} of the brain")
    if not distances.min() >= MIN_DISTANCE:
        raise TissuesNotFound(f"no three tissues: two are {distances.min():.2f} standard deviations apart")
    return mixture


def _histogram(values: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the bins and share of the voxels in each, (bins,) each.

    Darker and brighter voxels than it spans are counted in its first and last bin.
    """
    low, high = np.percentile(values, (0.1, 99.9))
    if not high > low:
        raise TissuesNotFound("no three tissues: the brain has one intensity")
    counts, edges = np.histogram(np.clip(values, low, high), bins, range=(low, high))
    return (edges[1:] + edges[:-1]) / 2, counts / counts.sum()


def _start(centres: np.ndarray, share: np.ndarray, divisions: Divisions) -> TissueMixture:
    """The three parts of the histogram with the smallest variance within them (Otsu 1979), the best of all divisions.

    EM only finds the nearest maximum, but from here all scans of a site are divided in the same way.
    """
    edges = np.append(np.arange(0, len(centres), max(1, len(centres) // 64)), len(centres))
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
    pure = Divisions(np.eye(3), np.arange(3), divisions.one_sd)
    found = _estimate(centres, responsibility, pure, np.ones(3), _smallest_sd(centres, share))
    if len(divisions.fractions) == 3:
        return found
    groups = np.bincount(divisions.group)
    return TissueMixture(divisions, found.means, found.sds, (1 / (len(groups) * groups))[divisions.group])


def _maximise(centres: np.ndarray, share: np.ndarray, mixture: TissueMixture, rounds: int) -> TissueMixture:
    """Expectation and maximisation until the likelihood per voxel grows by less than `TOLERANCE`."""
    before, smallest = -np.inf, _smallest_sd(centres, share)
    for _ in range(rounds):
        density = mixture.log_density(centres)
        largest = density.max(0)
        likelihood = np.exp(density - largest)
        total = likelihood.sum(0)
        mean = float((share * (largest + np.log(total))).sum())
        if not mean - before > TOLERANCE:
            break
        before = mean
        mixture = _estimate(centres, likelihood / total * share, mixture.divisions, mixture.sds, smallest)
    return mixture


def _estimate(
    centres: np.ndarray, responsibility: np.ndarray, divisions: Divisions, sds: np.ndarray, smallest: float
) -> TissueMixture:
    """The mixture that is most likely if component k has the share `responsibility[k]` (K, N) of the histogram.

    Args:
        sds: (3,) of the previous round, by which the components weigh in the means.
        smallest: bound of the standard deviations.
    """
    fractions = divisions.fractions
    mass = np.maximum(responsibility.sum(1), 1e-9)
    certainty = fractions / (fractions @ sds**2)[:, None]  # (K, 3)
    means = np.linalg.solve((certainty * mass[:, None]).T @ fractions, certainty.T @ (responsibility @ centres))
    squares = (responsibility * (centres - (fractions @ means)[:, None]) ** 2).sum(1)
    if divisions.one_sd:
        variances = np.full(3, squares.sum() / mass.sum())
    else:
        variances = fractions.T @ squares / (fractions.T @ mass)
    groups = np.bincount(divisions.group, mass) / np.bincount(divisions.group)
    weights = groups[divisions.group]
    return TissueMixture(divisions, means, np.sqrt(np.maximum(variances, smallest**2)), weights / weights.sum())


def _smallest_sd(centres: np.ndarray, share: np.ndarray) -> float:
    """Half the median distance between neighbouring intensities that occur.

    Without a bound, a Gaussian can collapse onto one level of a quantised scan.
    """
    return float(np.median(np.diff(centres[share > 0]))) / 2
