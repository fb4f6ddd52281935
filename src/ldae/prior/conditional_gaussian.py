"""A Gaussian of u given labels, u ~ N(features B, S), and what it says of u_t for a diffusion model.

With alpha = sqrt(A_t), sigma = sqrt(1 - A_t), mean m and a direction of variance s, u_t has the variance
V = alpha^2 s + sigma^2 there, and the best prediction of v = alpha eps - sigma u is

    E[v | u_t] = alpha sigma (1 - s) / V (u_t - alpha m) - sigma m

which is 0 for m = 0 and s = 1: whitened y without labels. A network that predicts the difference from this learns
only in what the distribution of y is not Gaussian.
"""

import torch
from torch import Tensor, nn

RIDGE = 1.0  # penalty on the slopes of standardised features, in subjects


class ConditionalGaussian(nn.Module):
    """u (B, k) given features (B, F) of labels; where no label is given, u ~ N(0, I).

    Args:
        features: F.
        components: k.
    """

    def __init__(self, features: int, components: int) -> None:
        super().__init__()
        self.register_buffer("slopes", torch.zeros(features, components))
        self.register_buffer("directions", torch.eye(components))
        self.register_buffer("variances", torch.ones(components))

    @torch.no_grad()
    def fit(self, features: Tensor, u: Tensor, weights: Tensor, subjects: int) -> None:
        """Weighted ridge regression of u (N, k) on features (N, F), and the covariance of what it leaves.

        Labels tell of few directions. In all others the slopes are chance, which explains a share of rank / subjects of
        the variance. Slopes are shrunk by what is expected of chance (positive-part James and Stein 1961).

        Args:
            weights: (N,), which add up to 1.
            subjects: number of subjects; scans of one subject tell little more than one of them.
        """
        if not len(self.slopes):
            return
        x, u, w = (value.double().cpu() for value in (features, u, weights))
        gram = x.T @ (w[:, None] * x)
        penalty = RIDGE / subjects * torch.eye(x.shape[1], dtype=x.dtype)
        slopes = torch.linalg.solve(gram + penalty, x.T @ (w[:, None] * u))
        chance = torch.linalg.matrix_rank(gram, hermitian=True) / subjects
        slopes = slopes * (1 - chance / (w @ (x @ slopes).square()).clamp(min=1e-12)).clamp(min=0)
        rest = u - x @ slopes
        variances, directions = torch.linalg.eigh(rest.T @ (w[:, None] * rest))
        self.slopes.copy_(slopes)
        self.directions.copy_(directions)
        self.variances.copy_(variances.clamp(min=1e-4))

    def mean(self, features: Tensor) -> Tensor:
        """m, (B, k); features are 0 where no label is given, and so is m."""
        return features @ self.slopes

    def variance(self, given: Tensor) -> Tensor:
        """s along each direction, (B, k), for `given` (B, 1) bool."""
        return torch.where(given, self.variances, torch.ones_like(self.variances))

    def draw(self, noise: Tensor, features: Tensor, given: Tensor) -> Tensor:
        """u (B, k) from standard normal noise (B, k)."""
        return self.mean(features) + (self.variance(given).sqrt() * (noise @ self.directions)) @ self.directions.T

    def predict_v(self, u_t: Tensor, alpha: Tensor, sigma: Tensor, features: Tensor, given: Tensor) -> Tensor:
        """E[v | u_t], (B, k); alpha and sigma (B, 1)."""
        mean, variance = self.mean(features), self.variance(given)
        along = (u_t - alpha * mean) @ self.directions
        factor = alpha * sigma * (1 - variance) / (alpha.square() * variance + sigma.square())
        return (factor * along) @ self.directions.T - sigma * mean
