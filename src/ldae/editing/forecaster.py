"""How y of a scan moves over the years, with its uncertainty, as it was learned from pairs of visits (forecast_fit.py).

With c the coordinates of y along the principal directions of training scans' y, and f = (1, c, columns, such as age),

    c(after g years) = c + g B f + e,    e with a variance of a + b g^2

B is a ridge regression, in which everything but the population's mean change (the row of 1) is shrunken. e is one of
the residuals of training pairs that B was not fitted on, scaled to the years. Volumes of structures are forecast
likewise, as the logarithm of their ratio, with an interval that contains 95 % of such residuals.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from ldae.editing.covariates import Covariate
from ldae.editing.editor import Editor
from ldae.utils.seeding import derive_seed

LEVEL = 0.95  # of the intervals
FAR = 1.5  # times the longest time between training visits: further ahead, a forecast is warned of


@dataclass(frozen=True)
class Spread:
    """Standard deviation of the residuals after g years, sqrt(constant + growing g^2)."""

    constant: float
    growing: float

    @classmethod
    def fit(cls, squared: np.ndarray, years: np.ndarray) -> "Spread":
        """Least squares of squared residuals (N,) over the years between visits (N,), neither part negative."""
        from scipy.optimize import nnls

        found, _ = nnls(np.stack([np.ones_like(years), years**2], 1), squared)
        return cls(float(found[0]), float(found[1])) if found.sum() > 0 else cls(1e-12, 0.0)

    def __call__(self, years: np.ndarray) -> np.ndarray:
        """The deviation after these years."""
        return np.sqrt(self.constant + self.growing * np.asarray(years, np.float64) ** 2)


@dataclass(frozen=True)
class VolumeForecast:
    """Change of a structure's volume.

    Attributes:
        rate: (1 + P,), change of the logarithm of the volume a year, of the features.
        spread: of the residuals of held-out training pairs.
        width: half the width of the interval, in deviations of `spread`.
    """

    rate: np.ndarray
    spread: Spread
    width: float

    def ratio(self, features: np.ndarray, years: np.ndarray) -> np.ndarray:
        """Volume after `years` (N,) over that of the scan, (N, 3): forecast, and both ends of the interval."""
        change, half = years * (features @ self.rate), self.width * self.spread(years)
        return np.exp(np.stack([change, change - half, change + half], 1))


@dataclass(frozen=True)
class Forecaster:
    """See the module's docstring.

    Attributes:
        centre: (D,), mean y of the training scans.
        basis: (D, K), principal directions of it, orthonormal.
        unit: c = (y - centre) basis / unit.
        covariates: the columns of the table that are read.
        rate: (1 + P, K), B above; P features are the K coordinates and those of the covariates.
        residuals: (M, K), residuals of held-out training pairs, each over its deviation.
        spread: that deviation.
        volumes: forecasts by structure.
        years: the shortest and the longest time between two visits of the training pairs.
        editor: inverts and decodes.
        pairs, subjects: how many it was fitted on.
    """

    centre: np.ndarray
    basis: np.ndarray
    unit: float
    covariates: tuple[Covariate, ...]
    rate: np.ndarray
    residuals: np.ndarray
    spread: Spread
    years: tuple[float, float]
    volumes: Mapping[str, VolumeForecast] = field(default_factory=dict)
    editor: Editor = field(default_factory=lambda: Editor(depth=1.0))
    pairs: int = 0
    subjects: int = 0

    def coordinates(self, y: np.ndarray) -> np.ndarray:
        """c of y (N, D), (N, K)."""
        return (np.asarray(y, np.float64) - self.centre) @ self.basis / self.unit

    def features(self, y: np.ndarray, table: pd.DataFrame) -> np.ndarray:
        """(N, 1 + P) of y (N, D) and the rows of the table; a column that it lacks counts as missing."""
        missing = pd.Series([""] * len(y))
        columns = [one.encode(table.get(one.column, missing)) for one in self.covariates]
        return np.concatenate([np.ones((len(y), 1)), self.coordinates(y), *columns], 1)

    def change(self, y: np.ndarray, table: pd.DataFrame, years: np.ndarray) -> np.ndarray:
        """Forecast change of y (N, D) after `years` (N,), (N, D)."""
        moved = np.asarray(years, np.float64)[:, None] * (self.features(y, table) @ self.rate)
        return self.unit * moved @ self.basis.T

    def draw(self, years: float, count: int, seed: int) -> np.ndarray:
        """Random deviations of y from the forecast after `years`, (count, D)."""
        rng = np.random.default_rng(derive_seed(seed, "forecast"))
        chosen = rng.choice(len(self.residuals), count, replace=count > len(self.residuals))
        sign = rng.choice([-1.0, 1.0], (count, 1))  # so that few draws have no common direction
        return self.unit * sign * self.residuals[chosen] * self.spread(np.array(years)) @ self.basis.T

    def notes(self, years: Sequence[float], given: Iterable[str]) -> list[str]:
        """What limits forecasts after `years`: times far beyond those it was learned from, and columns not given."""
        found, longest = [], max(years)
        if longest > FAR * self.years[1]:
            found.append(
                f"{longest:g} years is far beyond the visits that this forecast was learned from, which lie "
                f"{self.years[0]:.2g} to {self.years[1]:.2g} years apart: it assumes that the change goes on as fast"
            )
        missing = [one.column for one in self.covariates if one.column not in set(given)]
        if missing:
            found.append(f"not given, and taken as the mean of the training scans: {', '.join(missing)} (--column)")
        return found
