"""The gradient estimator G_psi(z_t, t, y) (PDAE, arXiv 2212.12990, section 3.3): what y adds to the U-Net's estimate.

It reuses the frozen U-Net's time embedding, skips and deepest features, and has its own way up, shaped as the U-Net's,
whose blocks see y besides the time.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ldae.models.unet import Architecture, Features, UNet, UpPath


class GradientEstimator(nn.Module):
    """(features of (z_t, t), y) -> G, (B, in_channels, X, Y, Z); exactly 0 before training.

    Args:
        semantic_dim: width of y.
        unet: the arguments of the U-Net whose features it takes (see Architecture).
    """

    def __init__(self, semantic_dim: int = 768, **unet: Any) -> None:
        super().__init__()
        shape = Architecture(**unet)
        self.checkpointing = shape.checkpointing
        self.semantic = nn.Linear(semantic_dim, shape.embedding)
        self.path = UpPath(shape, semantic=True)

    @torch.no_grad()
    def start_from(self, unet: UNet) -> None:
        """Start the way up as a copy of the trained U-Net's, but for the last convolution, which stays zero: G is 0.

        As built, each block's last convolution is zero too: y reaches G through two zeros in a row, a saddle that short
        runs never leave (z_0 errors with the own and another's y equal to four digits after hundreds of steps).
        """
        own, source = self.path.state_dict(), unet.path.state_dict()
        for name in source.keys() - {"conv.weight", "conv.bias"}:
            own[name].copy_(source[name])

    def forward(self, features: Features, y: Tensor) -> Tensor:
        """Features of the U-Net and y (B, semantic_dim) to G."""
        return self.path(features, self.semantic(y), self.checkpointing)
