"""Brightness made comparable by tissue: means of CSF, grey and white matter, found without an atlas."""

from dataclasses import dataclass

import numpy as np

from ldae.data.nifti import BadScan

VOXELS = 20_000  # that the mixture is fitted on


def estimate_tissue_means(values: np.ndarray) -> np.ndarray:
    """Means of CSF, grey and white matter in a T1w brain's voxels (N,), ascending, (3,): a mixture of three Gaussians.

    Raises:
        BadScan: there are not three.
    """
    from sklearn.mixture import GaussianMixture

    values = np.random.default_rng(0).permutation(values)[:VOXELS, None].astype(np.float64)
    start = np.percentile(values, [10, 50, 85])[:, None]
    if len(np.unique(start)) < 3:
        raise BadScan("its brain has no three tissues to normalise by")
    return np.sort(GaussianMixture(3, means_init=start, random_state=0).fit(values).means_[:, 0])


@dataclass(frozen=True)
class WhiteMatter:
    """Divides by the mean of white matter."""

    target: float = 1.0

    def __call__(self, data: np.ndarray, brain: np.ndarray) -> np.ndarray:
        """data (X, Y, Z), brain (X, Y, Z) bool -> data with white matter at `target`."""
        return data * (self.target / estimate_tissue_means(data[brain])[2])


@dataclass(frozen=True)
class Tissues:
    """Piecewise linear: 0 stays, and the means of CSF, grey and white matter come to `targets`."""

    targets: tuple[float, float, float] = (0.3, 0.7, 1.0)

    def __call__(self, data: np.ndarray, brain: np.ndarray) -> np.ndarray:
        """data (X, Y, Z), brain (X, Y, Z) bool -> data on the common scale; straight on beyond white matter."""
        knots = np.array([0.0, *estimate_tissue_means(data[brain])])
        targets = np.array([0.0, *self.targets])
        slope = (targets[3] - targets[2]) / (knots[3] - knots[2])
        return np.interp(data, knots, targets) + np.maximum(data - knots[3], 0) * slope
