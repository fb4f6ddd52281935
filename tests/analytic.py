"""Networks with a known answer: the exact eps of Gaussians and of mixtures in float64, and their probability flow."""

import torch
from torch import Tensor

from ldae.diffusion.schedule import Schedule


def levels(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(A_t), sqrt(1 - A_t) as (B, 1) float64."""
    return schedule.alpha(t).view(-1, 1), schedule.sigma(t).view(-1, 1)


class Gaussian:
    """eps of N(0, diag(std^2)) and the exact probability flow from one level to another."""

    def __init__(self, schedule: Schedule, std: Tensor) -> None:
        self.schedule, self.std = schedule, std.double()

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = levels(self.schedule, t)
        return sigma * z / (alpha**2 * self.std**2 + sigma**2)

    def flow(self, z: Tensor, path) -> Tensor:
        """z at the last node of the path from z at its first: every coordinate keeps its quantile."""
        alpha, sigma = torch.from_numpy(path.alpha.copy()), torch.from_numpy(path.sigma.copy())
        std = (alpha[:, None] ** 2 * self.std**2 + sigma[:, None] ** 2).sqrt()
        return z * std[-1] / std[0]


class Mixture:
    """eps of an even mixture of N(mean_k, diag(std^2)); means (K, D)."""

    def __init__(self, schedule: Schedule, means: Tensor, std: Tensor) -> None:
        self.schedule, self.means, self.std = schedule, means.double(), std.double()

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = levels(self.schedule, t)
        variance = (alpha**2 * self.std**2 + sigma**2).unsqueeze(1)
        offset = z.unsqueeze(1) - alpha.unsqueeze(1) * self.means
        weight = torch.softmax(-(offset**2 / variance).sum(-1) / 2, 1).unsqueeze(-1)
        return sigma * (weight * offset / variance).sum(1)


class Counted:
    """An eps_fn that records the timestep of every evaluation."""

    def __init__(self, eps_fn) -> None:
        self.eps_fn, self.times = eps_fn, []

    def __call__(self, z: Tensor, t: Tensor) -> Tensor:
        self.times.append(float(t[0]))
        return self.eps_fn(z, t)


def random_network(seed: int, channels: int = 3) -> torch.nn.Module:
    """A small convolutional eps_fn with random weights, float64."""
    torch.manual_seed(seed)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv3d(channels + 1, 16, 3, padding=1)
            self.last = torch.nn.Conv3d(16, channels, 3, padding=1)

        @torch.no_grad()
        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            time = (t / 1000).view(-1, 1, 1, 1, 1).expand(-1, 1, *z.shape[2:])
            return self.last(torch.tanh(self.first(torch.cat([z, time.to(z)], 1))))

    return Network().double()
