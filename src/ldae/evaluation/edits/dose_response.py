"""How each structure's volume follows alpha, and whether that is what the label does to brains.

What is right is taken from, in this order: the true counterfactuals of phantoms; the volumes of the training scans,
regressed on the label, if their slope differs from 0; the signs that are known of ageing and Alzheimer's disease.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ldae.data.subsampling import subsample_by_subject
from ldae.editing.direction import Direction
from ldae.editing.directions import labelled_rows
from ldae.editing.units import unit_of
from ldae.evaluation.context import Context
from ldae.evaluation.edits.anatomy import TRAIN_SCANS, read_true_volumes
from ldae.evaluation.edits.counterfactuals import SEEN, TRUE
from ldae.evaluation.edits.effects import slope, spearman
from ldae.evaluation.probes.bootstrap import draw_subject_weights, percentile_interval, summarise, summarise_mean
from ldae.evaluation.probes.targets import Probe

# Of disease and of age.
EXPECTED_SIGN = {"ventricle": 1, "inferior_lateral_ventricle": 1, "hippocampus": -1, "amygdala": -1}
MONOTONE = 0.9  # Spearman correlation from which a volume counts as following alpha
MOVES = 0.1  # share of the right slope from which a direction counts as moving a structure
PERIOD = {"years": 10}  # slopes of a number with this unit are also given per so many


@dataclass(frozen=True)
class RightSlope:
    """The slope that a structure's volume should have, mm3 per unit of alpha.

    Attributes:
        true: of the true counterfactuals of phantoms; seen: what the measure of the edits sees of them. (N,) or None.
        cohort: of the training scans' own volumes on the label, on the sample and its resamples, (1 + R,), or None.
    """

    true: np.ndarray | None = None
    seen: np.ndarray | None = None
    cohort: np.ndarray | None = None

    @property
    def comparable(self) -> np.ndarray | None:
        """The slopes that those of the edits are compared with, (N,)."""
        return self.true if self.seen is None else self.seen

    def sign(self, name: str) -> int:
        """1 if the structure should grow with alpha, else -1."""
        if self.true is not None and self.true.mean() != 0:
            return int(np.sign(self.true.mean()))
        if self.cohort is not None and self.cohort[0] != 0:
            low, high = percentile_interval(self.cohort[1:])
            if low > 0 or high < 0:
                return int(np.sign(self.cohort[0]))
        return EXPECTED_SIGN[name]

    def size(self) -> float:
        """Absolute value of the mean right slope; 0 if it is not known."""
        known = self.comparable if self.comparable is not None else self.cohort
        return 0.0 if known is None else abs(float(known.mean() if known is self.comparable else known[0]))


def measure_cohort_slopes(
    context: Context, probe: Probe, direction: Direction, names: Sequence[str], resamples: int
) -> dict[str, np.ndarray]:
    """Slope of each structure's true volume on the label in the training scans, mm3 per unit of alpha, (1 + R,) each.

    At most TRAIN_SCANS scans with a label are used. A slope across people is not an effect within them: other variables
    change along with the label.
    """
    amount = direction.amount_per_alpha()
    rows = labelled_rows(context.table, probe, context.rows("train"))
    rows = subsample_by_subject(rows, context.table["subject"].tolist(), TRAIN_SCANS, context.seed)
    truth = probe.target(context.table)[rows]
    if amount is None or not len(rows) or truth.std() == 0:
        return {}
    weights = draw_subject_weights(context.subjects(rows), resamples, context.seed)
    return {name: amount * weighted_slope(truth, read_true_volumes(context, name, rows), weights) for name in names}


def weighted_slope(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Least-squares slopes (R,) of y (N,) on x (N,) under weights (R, N); NaN where x is constant."""
    total = weights.sum(1)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    variance = weights @ (x * x) / total - mean_x**2
    covariance = weights @ (x * y) / total - mean_x * mean_y
    return np.divide(covariance, variance, out=np.full(len(total), np.nan), where=variance > 1e-12)


def right_slopes(
    metrics: Mapping[str, np.ndarray], expected: float | None, cohort: Mapping[str, np.ndarray], names: Sequence[str]
) -> dict[str, RightSlope]:
    """The right slope of each structure.

    Args:
        metrics: per scan, (N,) each, with those of `compare_with_counterfactuals` on phantoms.
        expected: the change of a phantom's factor that corresponds to alpha = 1.
        cohort: of `measure_cohort_slopes`.
    """

    def scaled(key: str) -> np.ndarray | None:
        return None if expected is None or key not in metrics else expected * metrics[key]

    return {name: RightSlope(scaled(f"{TRUE}{name}"), scaled(f"{SEEN}{name}"), cohort.get(name)) for name in names}


def summarise_dose_response(
    stem: str,
    alphas: Sequence[float],
    volumes: Mapping[str, np.ndarray],
    weights: np.ndarray,
    right: Mapping[str, RightSlope],
    direction: Direction,
) -> Iterator[tuple[str, float]]:
    """How each structure's volume (N, A) follows alpha; see manipulation.py for the names."""
    alphas = np.asarray(alphas)
    for name, measured in volumes.items():
        expected, slopes = right[name], slope(alphas, measured)
        sign, correlations = expected.sign(name), spearman(alphas, measured)
        yield from summarise_mean(f"{stem}/{name}_spearman_share", sign * correlations >= MONOTONE, weights)
        yield f"{stem}/{name}_spearman_median", float(np.median(correlations))
        yield from summarise_mean(f"{stem}/{name}_slope", slopes, weights)
        unedited = measured[:, alphas.tolist().index(0.0)]
        yield f"{stem}/{name}_slope_percent", float(100 * slopes.mean() / unedited.mean())
        yield from _summarise_per_period(f"{stem}/{name}_slope", slopes, weights, direction)
        yield from summarise_mean(f"{stem}/{name}_right", sign * slopes > 0, weights)
        yield from _compare_with_right_slope(f"{stem}/{name}_slope", slopes, weights, expected)
        yield f"{stem}/{name}_moves", float(moves(slopes, weights, expected, name))


def moves(slopes: np.ndarray, weights: np.ndarray, right: RightSlope, name: str) -> bool:
    """Whether edits move a structure as they should.

    The interval of the mean of their slopes (N,) must lie on the right side of 0, and the mean must be at least MOVES
    of the right slope.
    """
    means = right.sign(name) * (weights @ slopes) / weights.sum(1)
    low, _ = percentile_interval(means[1:])
    return bool(low > 0 and means[0] >= MOVES * right.size())


def _summarise_per_period(
    stem: str, slopes: np.ndarray, weights: np.ndarray, direction: Direction
) -> Iterator[tuple[str, float]]:
    calibration, amount = direction.calibration, direction.amount_per_alpha()
    period = PERIOD.get(unit_of(calibration.column)) if calibration and calibration.classes is None else None
    if period and amount:
        name = f"{stem}_per_{period}_{unit_of(calibration.column)}"
        yield from summarise_mean(name, slopes * period / amount, weights)


def _compare_with_right_slope(
    stem: str, slopes: np.ndarray, weights: np.ndarray, right: RightSlope
) -> Iterator[tuple[str, float]]:
    if right.cohort is not None:
        yield from summarise(f"{stem}_cohort", right.cohort)
    for key, values in (("true", right.true), ("seen", right.seen)):
        if values is not None:
            yield from summarise_mean(f"{stem}_{key}", values, weights)
    if right.comparable is not None:
        yield from summarise(f"{stem}_ratio", (weights @ slopes) / (weights @ right.comparable))
