"""Maps of CSF, grey and white matter of a brain scan, from its own intensities.

No atlas is needed: the scan's own intensities say which tissue is which, and a lesion, which looks like another tissue,
is counted as that. Makers of maps are compared by `python -m ldae.bench.views`.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, Self

import numpy as np

from ldae.data.tissue_mixture import Divisions, TissueMixture, TissuesNotFound, fit_tissues
from ldae.utils.errors import UserError

__all__ = ["Mixture", "PartialVolume", "Ramps", "SoftSegmentation", "TissueMaker", "TissueMaps", "TissuesNotFound"]

LEVELS = 4096  # intensities at which fractions are computed; those of voxels are interpolated


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

    def for_larger_voxels(self, ratio: float) -> "TissueMaker":
        """The maker whose maps of an averaged scan are most like the averages of the scan's own maps.

        Args:
            ratio: voxel size of the averaged scan over that of the scan, at least 1.
        """
        ...

    def __call__(self, data: np.ndarray) -> TissueMaps:
        """Maps of a brain (X, Y, Z) whose background is 0, without skull.

        Raises:
            TissuesNotFound: it has no three tissues.
        """
        ...


@dataclass(frozen=True)
class FixedMaker:
    """What makers have in common: their arguments say everything, and suit voxels of any size."""

    def parameters(self) -> dict[str, Any]:
        """Kind and arguments, and a version to be raised when they give other maps."""
        return {"kind": type(self).__qualname__, "version": 2, **asdict(self)}

    def for_larger_voxels(self, ratio: float) -> Self:
        """See TissueMaker."""
        return self


@dataclass(frozen=True)
class SoftSegmentation(FixedMaker):
    """CSF, grey and white matter with soft boundaries at fixed places between their means: three maps, sum 1.

    The default boundary counts a voxel that two tissues share to the darker one, unless nearly all of it is the other.
    The Gaussians of `Mixture` put it there too in scans of 1.5 mm (0.83 and 0.82 on the mean of 149 scans), which tells
    age better than the middle does; but in scans of large voxels they divide the same brains now here, now there. The
    means of `PartialVolume`, which are used here, do not.

    Args:
        boundary: share of the way from the mean of one tissue to the next at which both have the same value.
        width: of the transition, in the same unit.
        steps, bins, rounds: of the mixture that finds the means, see PartialVolume.
    """

    boundary: float = 0.8
    width: float = 0.4
    steps: int = 3
    bins: int = 512
    rounds: int = 300

    channels = 3

    def __post_init__(self) -> None:
        if not (0 < self.boundary < 1 and 0 < self.width <= 1):
            raise UserError(
                f"boundary {self.boundary}, width {self.width}: 0 < boundary < 1, 0 < width <= 1 are needed"
            )

    def for_larger_voxels(self, ratio: float) -> "SoftSegmentation":
        """See TissueMaker. Voxels of 4.75 mm average many of 1.5 mm on both sides of a boundary."""
        return replace(self, width=min(1.0, self.width * ratio))

    def __call__(self, data: np.ndarray) -> TissueMaps:
        """See TissueMaker."""
        values, brain = _brain(data), data > 0
        mixture = fit_tissues(values, Divisions.shared(self.steps), self.bins, self.rounds)
        low, middle, high = mixture.means
        # 0, 1 and 2 at the means, and linear beyond them.
        ends = [2 * low - middle, low, middle, high, 2 * high - middle]
        place = np.interp(values, ends, [-1, 0, 1, 2, 3])
        above = [np.clip((place - pair - self.boundary) / self.width + 0.5, 0, 1) for pair in (0, 1)]
        maps = np.zeros((3, *data.shape), np.float32)
        maps[:, brain] = 1 - above[0], above[0] - above[1], above[1]
        return TissueMaps(maps, mixture.describe())


@dataclass(frozen=True)
class PartialVolume(FixedMaker):
    """Fractions of CSF, grey and white matter in each voxel: three maps, which sum to 1 in the brain.

    The mixture has pure voxels and such that two tissues share, and one standard deviation.

    Args:
        steps: divisions of a shared voxel that are distinguished.
        bins: of the histogram.
        rounds: of expectation and maximisation, at most.
    """

    steps: int = 3
    bins: int = 512
    rounds: int = 300

    channels = 3

    def __call__(self, data: np.ndarray) -> TissueMaps:
        """See TissueMaker."""
        mixture = fit_tissues(_brain(data), Divisions.shared(self.steps), self.bins, self.rounds)
        return _map_fractions(data, mixture)


@dataclass(frozen=True)
class Mixture(FixedMaker):
    """Probabilities of CSF, grey and white matter from three Gaussians: three maps, which sum to 1 in the brain.

    Args:
        bins, rounds: as for PartialVolume.
    """

    bins: int = 512
    rounds: int = 500

    channels = 3

    def __call__(self, data: np.ndarray) -> TissueMaps:
        """See TissueMaker."""
        return _map_fractions(data, fit_tissues(_brain(data), Divisions.pure(), self.bins, self.rounds))


@dataclass(frozen=True)
class Ramps(FixedMaker):
    """Two maps that grow linearly, from 0 at the mean of CSF to 1 at that of grey matter, and from there to white.

    Args:
        steps, bins, rounds: of the mixture whose means are used, see PartialVolume.
    """

    steps: int = 3
    bins: int = 512
    rounds: int = 300

    channels = 2

    def __call__(self, data: np.ndarray) -> TissueMaps:
        """See TissueMaker."""
        mixture = fit_tissues(_brain(data), Divisions.shared(self.steps), self.bins, self.rounds)
        steps = zip(mixture.means[:-1], mixture.means[1:], strict=True)
        maps = [np.clip((data - low) / (high - low), 0, 1) for low, high in steps]
        return TissueMaps(np.stack(maps).astype(np.float32), mixture.describe())


def _brain(data: np.ndarray) -> np.ndarray:
    return data[data > 0].astype(np.float64)


def _map_fractions(data: np.ndarray, mixture: TissueMixture) -> TissueMaps:
    """Fractions of the tissues in each voxel of a brain (X, Y, Z)."""
    # Exponentials of every voxel would take longer than all the rest.
    levels = np.linspace(mixture.means[0], mixture.means[-1], LEVELS)
    maps, brain = np.zeros((3, *data.shape), np.float32), data > 0
    for tissue, fraction in zip(maps, mixture.fractions_at(levels), strict=True):
        tissue[brain] = np.interp(data[brain], levels, fraction)
    return TissueMaps(maps, mixture.describe())
