"""Intensity normalisation by tissue: the means of CSF, grey and white matter are found without an atlas."""

from dataclasses import dataclass

import numpy as np

from ldae.data.nifti import BadScan

MIXTURE_VOXELS = 20_000  # number of voxels that the mixture is fitted to


def estimate_tissue_means(values: np.ndarray) -> np.ndarray:
    """Fit a mixture of three Gaussians to the voxels of a T1w brain.

    Args:
        values: intensities inside the brain, (N,).

    Returns:
        Mean intensities of CSF, grey matter and white matter, ascending, (3,).

    Raises:
        BadScan: the intensities do not separate into three tissues.
    """
    from sklearn.mixture import GaussianMixture

    values = np.random.default_rng(0).permutation(values)[:MIXTURE_VOXELS, None].astype(np.float64)
    start = np.percentile(values, [10, 50, 85])[:, None]
    if len(np.unique(start)) < 3:
        raise BadScan("its brain has no three tissues to normalise by")
    return np.sort(GaussianMixture(3, means_init=start, random_state=0).fit(values).means_[:, 0])


@dataclass(frozen=True)
class WhiteMatter:
    """Scale the intensities so that the mean of white matter becomes `target`."""

    target: float = 1.0

    def __call__(self, data: np.ndarray, brain: np.ndarray) -> np.ndarray:
        """Normalise intensities (X, Y, Z), given the brain mask (X, Y, Z) bool."""
        return data * (self.target / estimate_tissue_means(data[brain])[2])


@dataclass(frozen=True)
class Tissues:
    """Map 0 to 0 and the means of CSF, grey and white matter to `targets`, linearly in between and beyond."""

    targets: tuple[float, float, float] = (0.3, 0.7, 1.0)

    def __call__(self, data: np.ndarray, brain: np.ndarray) -> np.ndarray:
        """Normalise intensities (X, Y, Z), given the brain mask (X, Y, Z) bool."""
        knots = np.array([0.0, *estimate_tissue_means(data[brain])])
        targets = np.array([0.0, *self.targets])
        slope = (targets[3] - targets[2]) / (knots[3] - knots[2])
        return np.interp(data, knots, targets) + np.maximum(data - knots[3], 0) * slope
