"""A forecast of y that is known, for the tests of what uses one."""

import numpy as np

from ldae.editing.covariates import Covariate
from ldae.editing.editor import Editor
from ldae.editing.forecaster import Forecaster, Spread, VolumeForecast


def a_forecaster(dim: int = 16, count: int = 3, categories: tuple[str, ...] = ("AD", "CN")) -> Forecaster:
    """y moves by 1 a year along its first number, and twice as fast in AD; volumes grow by 10 % a year."""
    shares = (1 / len(categories),) * len(categories)
    covariates = (Covariate("age", 70, 10), Covariate("diagnosis", categories=categories, shares=shares))
    rate = np.zeros((1 + count + 1 + len(categories), count))
    rate[0, 0], rate[-len(categories), 0] = 1.5, 1.0
    volume = np.zeros(len(rate))
    volume[0] = np.log(1.1)
    return Forecaster(
        np.zeros(dim), np.eye(dim)[:, :count], 1.0, covariates, rate, np.random.default_rng(0).normal(size=(20, count)),
        Spread(0.01, 0.01), (0.5, 2.0), {"ventricle": VolumeForecast(volume, Spread(1e-4, 1e-4), 2.0)},
        Editor(depth=1.0), 30, 20,
    )  # fmt: skip
