"""Noise schedules: A_t = a_0 a_1 ... a_t with a_t = 1 - beta_t (DDPM, arXiv 2006.11239), in float64.

t may be fractional: log A_t is interpolated linearly between integers. t = -1 is the noise-free end, A = 1.
"""

import math

import numpy as np
import torch
from torch import Tensor

from ldae.utils.errors import UserError


class Schedule:
    """A schedule of T timesteps.

    Args:
        alpha_bar: A_t, (T,), strictly decreasing inside (0, 1); stored in float64.

    Raises:
        UserError: alpha_bar is not strictly decreasing inside (0, 1).
    """

    def __init__(self, alpha_bar: Tensor) -> None:
        alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64, device="cpu")
        valid = alpha_bar.ndim == 1 and len(alpha_bar) > 1 and bool((alpha_bar.diff() < 0).all())
        if not (valid and alpha_bar[-1] > 0 and alpha_bar[0] < 1):
            raise UserError("schedule: A_t must decrease strictly inside (0, 1); check its betas")
        self.alpha_bar = alpha_bar
        # Entry i is log A at t = i - 1, so that the noise-free end t = -1 needs no special case.
        start = torch.zeros(1, dtype=torch.float64, device="cpu")
        self._tables = {torch.device("cpu"): torch.cat([start, alpha_bar.log()])}

    @property
    def timesteps(self) -> int:
        """T, the number of timesteps."""
        return len(self.alpha_bar)

    def to(self, device: torch.device) -> "Schedule":
        """This schedule, with its table copied to `device` now, so that the first use there does not wait for it."""
        self.log_alpha_bar(torch.zeros((), device=device))
        return self

    def log_alpha_bar(self, t: Tensor | float) -> Tensor:
        """log A_t in float64, of the shape and on the device of t; t in [-1, T-1]."""
        t = torch.as_tensor(t)
        if t.device not in self._tables:
            self._tables[t.device] = self._tables[torch.device("cpu")].to(t.device)
        table = self._tables[t.device]
        position = (t.to(torch.float64) + 1).clamp(0, self.timesteps)
        lower = position.floor().long().clamp(max=self.timesteps - 1)
        # `take`, because indexing with a 0-d tensor would read its value back from the device.
        return torch.lerp(table.take(lower), table.take(lower + 1), position - lower)

    def alpha(self, t: Tensor | float) -> Tensor:
        """sqrt(A_t), the coefficient of z_0 in z_t, float64."""
        return (self.log_alpha_bar(t) / 2).exp()

    def sigma(self, t: Tensor | float) -> Tensor:
        """sqrt(1 - A_t), the coefficient of the noise in z_t, float64."""
        return torch.expm1(self.log_alpha_bar(t)).abs().sqrt()  # abs, not minus, which gives -0.0 at t = -1

    def snr(self, t: Tensor | float) -> Tensor:
        """SNR_t = A_t / (1 - A_t), float64; infinite at t = -1."""
        return 1 / torch.expm1(-self.log_alpha_bar(t)).abs()

    def timestep_of(self, log_alpha_bar: np.ndarray) -> np.ndarray:
        """The fractional t in [-1, T-1] at which log A_t has this value: the inverse of `log_alpha_bar`."""
        table = self._tables[torch.device("cpu")].numpy()
        return np.interp(-np.asarray(log_alpha_bar), -table, np.arange(-1.0, self.timesteps))


def _from_betas(betas: Tensor) -> Schedule:
    return Schedule(torch.exp(torch.cumsum(torch.log1p(-betas), 0)))


def _evenly_spaced(start: float, end: float, count: int) -> Tensor:
    # Explicitly on the CPU: under a default device of "meta" the schedule would have no values.
    return torch.linspace(start, end, count, dtype=torch.float64, device="cpu")


def linear(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """beta_t evenly spaced (DDPM); the published schedule."""
    return _from_betas(_evenly_spaced(beta_start, beta_end, timesteps))


def scaled_linear(timesteps: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0205) -> Schedule:
    """sqrt(beta_t) evenly spaced (latent diffusion, arXiv 2112.10752); values of the brain LDM, arXiv 2209.07162."""
    return _from_betas(_evenly_spaced(beta_start**0.5, beta_end**0.5, timesteps).square())


def cosine(timesteps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """A_t proportional to a squared cosine (improved DDPM, arXiv 2102.09672, eq. 17); beta_t at most `max_beta`."""
    t = torch.arange(timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
    curve = torch.cos((t + offset) / (1 + offset) * math.pi / 2).square()
    return _from_betas((1 - curve[1:] / curve[:-1]).clamp(max=max_beta))
