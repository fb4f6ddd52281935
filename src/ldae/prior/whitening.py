"""Brings y to the principal subspace of the training scans, where every direction has mean 0 and variance 1.

The spectrum of y is steep, and with `model/encoder=components` y lies in a subspace of at most 64 of its 768
dimensions. There u = (y - mean) V / std, and y = mean + (u std) V'. What y has outside of this subspace is left out.
"""

import torch
from torch import Tensor, nn

SMALLEST_VARIANCE = 1e-6  # of a direction, over that of the first; below that it is rounding


class Whitening(nn.Module):
    """y (B, dim) to u (B, components) and back. Directions that the training scans do not have are 0 both ways.

    Args:
        dim: width of y.
        components: directions that are kept, at most.
    """

    def __init__(self, dim: int, components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("directions", torch.zeros(components, dim))
        self.register_buffer("std", torch.zeros(components))

    @torch.no_grad()
    def fit(self, y: Tensor, weights: Tensor) -> float:
        """Measure the subspace on training scans.

        Args:
            y: (N, dim).
            weights: (N,), which add up to 1.

        Returns:
            The share of the variance of y that the subspace has.
        """
        y, weights = y.double().cpu(), weights.double().cpu()
        mean = weights @ y
        # Unbiased: the mean is that of the same scans.
        scale = 1 / (1 - weights.square().sum()).clamp(min=1e-12)
        _, sizes, directions = torch.linalg.svd((weights * scale).sqrt()[:, None] * (y - mean), full_matrices=False)
        variances = sizes.square()
        kept = min(len(self.std), int((variances > SMALLEST_VARIANCE * variances[0]).sum()), len(y) - 1)
        for buffer in (self.directions, self.std):
            buffer.zero_()
        self.mean.copy_(mean)
        self.directions[:kept].copy_(directions[:kept])
        self.std[:kept].copy_(sizes[:kept])
        return float(variances[:kept].sum() / variances.sum())

    @property
    def exists(self) -> Tensor:
        """1 for each direction that the training scans have, else 0, (components,) float32."""
        return (self.std > 0).float()

    def whiten(self, y: Tensor) -> Tensor:
        """u (B, components) of y (B, dim)."""
        inverse = torch.where(self.std > 0, 1 / self.std.clamp(min=1e-30), torch.zeros_like(self.std))
        return (y - self.mean) @ self.directions.T * inverse

    def unwhiten(self, u: Tensor) -> Tensor:
        """y (B, dim) of u (B, components)."""
        return self.mean + (u * self.std) @ self.directions
