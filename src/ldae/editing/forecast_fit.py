"""Fits the forecast of y (forecaster.py) to pairs of visits of training subjects.

The difference of two visits also contains the noise of both, that of the first with the opposite sign: a first visit
that happens to lie on one side is followed by one that lies less so. Over time this would look like a slow change
towards the mean. So the regression has a further part that does not depend on the time between the visits, A c, which
takes up this regression to the mean and is not used afterwards. How much each part is shrunken is chosen by folds over
subjects.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pandas as pd

from ldae.editing.covariates import Covariate
from ldae.editing.forecaster import LEVEL, Forecaster, Spread, VolumeForecast
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

DIRECTIONS = 64  # of y, at most
FOLDS, MIN_SUBJECTS = 5, 10
KEPT = 512  # residuals that are stored, at most
INF = float("inf")
# Penalties, over the number of pairs and the mean squared years, of c, of the columns, and of the regression to the
# mean. INF leaves a part out; all INF is the population's mean change.
Y_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, INF)
COLUMN_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, INF)
REVERSION_PENALTIES = (1e-2, 1e-1, 1.0, INF)


@dataclass(frozen=True)
class VisitPairs:
    """Pairs of visits of one subject each.

    Attributes:
        first, second: (N,) their rows.
        years: (N,) between them.
        subjects: (N,).
    """

    first: np.ndarray
    second: np.ndarray
    years: np.ndarray
    subjects: np.ndarray

    def __len__(self) -> int:
        return len(self.years)


def find_pairs(table: pd.DataFrame, rows: np.ndarray) -> VisitPairs:
    """Every earlier and later visit of every subject among `rows`, in table order of subjects."""
    found = []
    for subject, visits in table.iloc[rows].assign(row=rows).groupby("subject", sort=False):
        visits = visits.sort_values("months")
        numbers, months = visits["row"].tolist(), visits["months"].astype(float).tolist()
        for j in range(len(numbers)):
            found += [
                (numbers[i], numbers[j], (months[j] - months[i]) / 12, str(subject))
                for i in range(j)
                if months[i] < months[j]
            ]
    first, second, years, subjects = zip(*found, strict=True) if found else ((), (), (), ())
    return VisitPairs(np.array(first, int), np.array(second, int), np.array(years, float), np.array(subjects, str))


@dataclass(frozen=True)
class RateFit:
    """A regression of changes on features.

    Attributes:
        rate: (1 + P, T).
        held_out: (N, T), the change of each pair as it is predicted by a fit without its subject's fold.
        penalties: that were chosen, of y, columns and regression to the mean.
    """

    rate: np.ndarray
    held_out: np.ndarray
    penalties: tuple[float, float, float]


def fit_rates(
    change: np.ndarray,
    pairs: VisitPairs,
    features: np.ndarray,
    coordinates: int,
    seed: int,
    reverting: bool = True,
) -> RateFit:
    """Fit B of change = years * features B + coordinates A + residual.

    Args:
        change: (N, T).
        features: (N, 1 + P), of the first visits: 1, the coordinates of y, the columns.
        coordinates: how many coordinates there are.
        reverting: whether there is a part A.
    """
    own = features[:, 1 : 1 + coordinates]
    design = np.concatenate([pairs.years[:, None] * features, own], 1)
    count, width = features.shape[1] - 1 - coordinates, features.shape[1]
    scale = len(pairs) * float(np.mean(pairs.years**2))

    def penalty(of_y: float, of_columns: float, of_reversion: float) -> np.ndarray:
        parts = ([0.0], [of_y] * coordinates, [of_columns] * count, [of_reversion] * coordinates)
        return scale * np.concatenate([np.asarray(part, np.float64) for part in parts])

    fold = draw_folds(pairs.subjects, seed)
    sums = [(design[fold == k].T @ design[fold == k], design[fold == k].T @ change[fold == k]) for k in range(FOLDS)]
    whole = [sum(parts) for parts in zip(*sums, strict=True)]

    def held_out(chosen: tuple[float, float, float], columns: int) -> np.ndarray:
        predicted = np.zeros_like(change)
        for k, (gram, right) in enumerate(sums):
            solved = _solve(whole[0] - gram, whole[1] - right, penalty(*chosen))
            predicted[fold == k] = design[fold == k, :columns] @ solved[:columns]
        return predicted

    reversions = REVERSION_PENALTIES if reverting else (INF,)
    choices = list(product(Y_PENALTIES, COLUMN_PENALTIES if count else (INF,), reversions))
    errors = [float(np.mean((change - held_out(choice, design.shape[1])) ** 2)) for choice in choices]
    best = choices[int(np.argmin(errors))]
    return RateFit(_solve(*whole, penalty(*best))[:width], held_out(best, width), best)


def draw_folds(subjects: np.ndarray, seed: int) -> np.ndarray:
    """The fold of every pair, (N,), by subject."""
    names, inverse = np.unique(subjects, return_inverse=True)
    return (np.random.default_rng(seed).permutation(len(names)) % FOLDS)[inverse]


def _solve(gram: np.ndarray, right: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Ridge coefficients; those with an infinite penalty are 0."""
    kept, found = np.isfinite(penalty), np.zeros_like(right)
    system = gram[np.ix_(kept, kept)] + np.diag(penalty[kept] + 1e-9 * np.trace(gram) / len(gram))
    found[kept] = np.linalg.solve(system, right[kept])
    return found


@dataclass(frozen=True)
class FittedForecast:
    """A forecaster and what it was fitted on.

    Attributes:
        pairs: the training pairs.
        penalties: of y, columns and regression to the mean; inf is a part that was left out.
    """

    forecaster: Forecaster
    pairs: VisitPairs
    penalties: tuple[float, float, float]


def fit_forecaster(
    table: pd.DataFrame,
    y: np.ndarray,
    rows: np.ndarray,
    columns: Sequence[str],
    volumes: Mapping[str, np.ndarray],
    seed: int,
) -> FittedForecast:
    """Fit a forecaster to the pairs of visits among training rows.

    Args:
        y: (N, D) of every row of the table.
        rows: of the training scans.
        columns: of the table that the forecast reads beside y; those that say nothing are left out.
        volumes: (N,) mm3 of every row by structure, NaN where it is not known.

    Raises:
        UserError: fewer than `MIN_SUBJECTS` subjects have two visits.
    """
    pairs = find_pairs(table, rows)
    subjects = len(set(pairs.subjects))
    if subjects < MIN_SUBJECTS:
        raise UserError(
            f"{subjects} training subjects have two visits, a forecast needs {MIN_SUBJECTS}: train on a table in which "
            "subjects have several sessions (column 'session', in months)"
        )
    found = (Covariate.fit(column, table[column].iloc[rows]) for column in columns if column in table)
    covariates = tuple(one for one in found if one is not None)
    centre, basis, unit = find_coordinates(y[rows])
    forecaster = Forecaster(
        centre, basis, unit, covariates, np.zeros((1, 1)), np.zeros((1, 1)), Spread(0, 0),
        (float(pairs.years.min()), float(pairs.years.max())), pairs=len(pairs), subjects=subjects,
    )  # fmt: skip
    features = forecaster.features(y[pairs.first], table.iloc[pairs.first].reset_index(drop=True))
    coordinates, count = forecaster.coordinates(y), basis.shape[1]
    moved = coordinates[pairs.second] - coordinates[pairs.first]
    fit = fit_rates(moved, pairs, features, count, seed)
    residuals = moved - fit.held_out
    spread = Spread.fit(np.mean(residuals**2, 1), pairs.years)
    kept = np.random.default_rng(seed).permutation(len(pairs))[:KEPT]
    changes = {name: _fit_volume(measured, pairs, features, count, seed) for name, measured in volumes.items()}
    whole = replace(
        forecaster,
        rate=fit.rate,
        residuals=(residuals / spread(pairs.years)[:, None])[kept],
        spread=spread,
        volumes={name: found for name, found in changes.items() if found is not None},
    )
    return FittedForecast(whole, pairs, fit.penalties)


def find_coordinates(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean of y (N, D), its principal directions (D, K), and the unit in which coordinates have a variance of 1."""
    centre = np.asarray(y, np.float64).mean(0)
    _, sizes, directions = np.linalg.svd(y - centre, full_matrices=False)
    count = min(DIRECTIONS, int(np.sum(sizes > 1e-6 * max(sizes[0], 1e-30))))
    unit = float(np.sqrt(np.mean(sizes[:count] ** 2) / len(y))) if count else 1.0
    return centre, directions[:count].T, unit


def _fit_volume(
    volumes: np.ndarray, pairs: VisitPairs, features: np.ndarray, coordinates: int, seed: int
) -> VolumeForecast | None:
    """The forecast of a structure's volumes (N,); None if too few pairs have both."""
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log(volumes[pairs.second] / volumes[pairs.first])
    known = np.isfinite(change)
    if len(set(pairs.subjects[known])) < MIN_SUBJECTS:
        return None
    part = VisitPairs(pairs.first[known], pairs.second[known], pairs.years[known], pairs.subjects[known])
    fit = fit_rates(change[known, None], part, features[known], coordinates, seed, reverting=False)
    residuals = change[known] - fit.held_out[:, 0]
    spread = Spread.fit(residuals**2, part.years)
    level = min(1.0, LEVEL * (1 + 1 / len(part)))
    width = float(np.quantile(np.abs(residuals) / spread(part.years), level, method="higher"))
    return VolumeForecast(fit.rate[:, 0], spread, width)
