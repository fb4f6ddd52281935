"""The gradient estimator G_psi(z_t, t, y) (PDAE, arXiv 2212.12990, section 3.3): what y adds to the U-Net's estimate.

It reuses the frozen U-Net's time embedding, skips and deepest features, and has its own way up, shaped as the U-Net's,
whose blocks see y besides the time.
"""

from typing import Any

from torch import Tensor, nn

from ldae.models.unet import Architecture, Features, UpPath


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

    def forward(self, features: Features, y: Tensor) -> Tensor:
        """Features of the U-Net and y (B, semantic_dim) to G."""
        return self.path(features, self.semantic(y), self.checkpointing)
