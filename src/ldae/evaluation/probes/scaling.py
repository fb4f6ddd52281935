"""How a probe scales its features before the penalty is applied (`conf/probe_scaling`).

A penalty treats all features alike, so their scale says how much each may contribute. Principal components, and a y
that starts from them, have a steep spectrum: the last components are mostly noise and small. Divided each by its own
standard deviation, they count as much as the first. `OneScale` keeps the spectrum, `PerFeature` is the published
standardisation.

The columns of a table (age, region volumes) have different units and are always standardised one by one.
"""

from typing import Protocol

import numpy as np

LENGTH = (
    768  # mean squared length of a row after `OneScale`: that of 768 standardised features, the published size of y
)
CONSTANT = 1e-12  # a standard deviation below this share of a feature's largest value is rounding


class Scaling(Protocol):
    """Chooses the numbers that the features of a probe, less their means, are divided by; from its fitting rows."""

    def divide_features(self, features: np.ndarray) -> np.ndarray:
        """(D,) divisors of features (N, D) of one kind: an embedding, or principal components."""
        ...

    def divide_columns(self, features: np.ndarray) -> np.ndarray:
        """(D,) divisors of the columns of a table (N, D)."""
        ...


class PerFeature:
    """Every feature is divided by its own standard deviation."""

    def divide_features(self, features: np.ndarray) -> np.ndarray:
        """(D,): the standard deviations; 1 for a constant feature."""
        return standard_deviations(features)

    def divide_columns(self, features: np.ndarray) -> np.ndarray:
        """The same."""
        return standard_deviations(features)


class OneScale:
    """All features of one kind are divided by the same number.

    The mean squared length of a row becomes `LENGTH`, whatever the number of features. So a rotation of the features or
    further constant ones change nothing, one penalty means the same for y and for baselines, and two kinds of features
    of one probe have equal weight.
    """

    def divide_features(self, features: np.ndarray) -> np.ndarray:
        """(D,): one number, repeated."""
        std = standard_deviations(features, constant=0.0)
        total = float((std**2).sum())
        return np.full(features.shape[1], np.sqrt(total / LENGTH) if total > 0 else 1.0)

    def divide_columns(self, features: np.ndarray) -> np.ndarray:
        """(D,): the standard deviations times one number."""
        std = standard_deviations(features, constant=0.0)
        varying = std > 0
        return np.where(varying, std * np.sqrt(max(varying.sum(), 1) / LENGTH), 1.0)


def standard_deviations(features: np.ndarray, constant: float = 1.0) -> np.ndarray:
    """Standard deviation of each feature of (N, D), (D,); `constant` for a constant one."""
    std = features.std(0)
    return np.where(std > CONSTANT * np.abs(features).max(0, initial=0.0), std, constant)
