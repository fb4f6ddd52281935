"""Paths through the noise levels: the timesteps at which a sampler evaluates the network, and the A of each node.

Grids of S steps, S + 1 nodes from t = 0 to t_end = depth (T - 1):
    uniform   t = int(linspace(0, t_end, S + 1)), as published
    log_snr   uniform in log A / (1 - A); t is fractional, because rounding would repeat timesteps
    angle     uniform in phi = arctan sqrt((1 - A) / A); t is fractional
    balanced  node density (sin phi)^(-1/2) (cos phi)^(-3/4) in phi; t is fractional. A compromise between angle
              (exponents 0), with too few nodes at both ends, and log_snr (exponents 1), with too many there. The
              exponents minimise the largest error of the third-order solver at 20 steps (samplers.Multistep)
End rules for the node at the noise-free end, where the network is evaluated at t = 0 under both:
    published  z there is the latent with A_0 = 0.9999
    closed     z there is the latent with A = 1
Sampling and inversion use the same nodes, so S steps take S evaluations under either rule. Coefficients come from the
nodes, never from t minus a stride. The log-SNR of A = 1 is infinite, so no sampler divides by sigma, and log_snr places
its other nodes as if the end were at t = 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ldae.diffusion.schedule import Schedule
from ldae.utils.errors import UserError


@dataclass(frozen=True)
class Path:
    """Nodes in the order in which a sampler visits them.

    Attributes:
        times: t at which the network is evaluated, (S+1,) float64.
        log_alpha_bar: log A of each node, (S+1,) float64; at the noise-free end it may differ from log A of its t.
    """

    times: np.ndarray
    log_alpha_bar: np.ndarray

    def __len__(self) -> int:
        return len(self.times)

    @cached_property
    def alpha(self) -> np.ndarray:
        """sqrt(A)."""
        return np.exp(self.log_alpha_bar / 2)

    @cached_property
    def sigma(self) -> np.ndarray:
        """sqrt(1 - A)."""
        return np.sqrt(np.abs(np.expm1(self.log_alpha_bar)))

    @cached_property
    def angle(self) -> np.ndarray:
        """phi in [0, pi/2), with alpha = cos(phi) and sigma = sin(phi)."""
        return np.arctan2(self.sigma, self.alpha)

    def reversed(self) -> "Path":
        """The same nodes in the opposite order."""
        return self[::-1]

    def __getitem__(self, nodes: slice) -> "Path":
        return Path(self.times[nodes], self.log_alpha_bar[nodes])


Grid = Callable[[Schedule, int, float], np.ndarray]  # (schedule, S, t_end) -> ascending t, (S+1,) float64


def uniform(schedule: Schedule, steps: int, end: float) -> np.ndarray:
    """Evenly spaced from 0 to `end`, rounded down to integers; (steps+1,) float64."""
    return np.floor(np.linspace(0, end, steps + 1))


ArrayFn = Callable[[np.ndarray], np.ndarray]


def _evenly_spaced(schedule: Schedule, steps: int, end: float, transform: ArrayFn, inverse: ArrayFn) -> np.ndarray:
    """t at even distances of `transform`(log A); `inverse` returns log A."""
    ends = transform(schedule.log_alpha_bar(torch.tensor([0.0, end])).numpy())
    times = schedule.timestep_of(inverse(np.linspace(*ends, steps + 1)))
    times[[0, -1]] = 0.0, end  # exactly, without the rounding of transform and inverse
    return times


def log_snr(schedule: Schedule, steps: int, end: float) -> np.ndarray:
    """Evenly spaced in log A / (1 - A) from t = 0 to `end`; (steps+1,) float64."""
    return _evenly_spaced(
        schedule, steps, end, lambda log_a: log_a - np.log(-np.expm1(log_a)), lambda value: -np.logaddexp(0, -value)
    )


def angle(schedule: Schedule, steps: int, end: float) -> np.ndarray:
    """Evenly spaced in phi = arccos sqrt(A) from t = 0 to `end`; (steps+1,) float64."""
    return _evenly_spaced(
        schedule,
        steps,
        end,
        lambda log_a: np.arcsin(np.sqrt(-np.expm1(log_a))),
        lambda phi: np.log1p(-(np.sin(phi) ** 2)),
    )


def balanced(schedule: Schedule, steps: int, end: float) -> np.ndarray:
    """Evenly spaced in the integral of (sin phi)^(-1/2) (cos phi)^(-3/4) dphi; (steps+1,) float64."""
    first, last = np.arcsin(schedule.sigma(torch.tensor([0.0, end])).numpy())
    # Trapezoidal rule on points even in log tan(phi), where the integrand is smooth:
    # dphi = sin(phi) cos(phi) d(log tan phi).
    log_tan = np.linspace(np.log(np.tan(first)), np.log(np.tan(last)), 20001)
    phi = np.arctan(np.exp(log_tan))
    density = np.sin(phi) ** 0.5 * np.cos(phi) ** 0.25
    integral = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    nodes = np.interp(np.linspace(0, integral[-1], steps + 1), integral, phi)
    times = schedule.timestep_of(np.log1p(-(np.sin(nodes) ** 2)))
    times[[0, -1]] = 0.0, end
    return times


GRIDS: dict[str, Grid] = {"uniform": uniform, "log_snr": log_snr, "angle": angle, "balanced": balanced}
ENDS = ("closed", "published")


def make_path(schedule: Schedule, steps: int, grid: str = "uniform", end: str = "closed", depth: float = 1.0) -> Path:
    """The path from the noise-free end to t = depth (T - 1), in order of increasing noise.

    Args:
        steps: S, in [1, T].
        grid, end: names of GRIDS and ENDS.
        depth: share of the schedule, in (0, 1].

    Raises:
        UserError: an argument is not one of these.
    """
    if grid not in GRIDS:
        raise UserError(f"sampler.grid={grid}: choose one of {', '.join(GRIDS)}")
    if end not in ENDS:
        raise UserError(f"sampler.end={end}: choose one of {', '.join(ENDS)}")
    if not 1 <= steps <= schedule.timesteps:
        raise UserError(f"sampler.steps={steps}: choose between 1 and {schedule.timesteps}")
    if not 0 < depth <= 1:
        raise UserError(f"depth={depth}: choose in (0, 1]")
    times = GRIDS[grid](schedule, steps, depth * (schedule.timesteps - 1))
    log_alpha_bar = schedule.log_alpha_bar(torch.from_numpy(times)).numpy().copy()
    if end == "closed":
        log_alpha_bar[0] = 0.0
    return Path(times, log_alpha_bar)
