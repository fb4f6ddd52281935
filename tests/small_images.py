"""Images that several test files measure."""

import torch
from torch import Tensor


def soft_ball(radius: float, size: int = 36) -> Tensor:
    """A bright ball in the middle of a head that stays the same, (1, 1, size, size, size)."""
    axes = torch.arange(size) - (size - 1) / 2
    x, y, z = torch.meshgrid(axes, axes, axes, indexing="ij")
    distance = (x**2 + y**2 + z**2).sqrt()
    head = torch.sigmoid(14 - distance) * (0.5 + 0.1 * torch.sin(x) * torch.sin(y) * torch.sin(z))
    return (head + 0.4 * torch.sigmoid(radius - distance))[None, None]
