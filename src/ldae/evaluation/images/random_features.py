"""A feature space without training: a small 3D convolutional network with fixed random weights.

It belongs to no model and to no cohort, which makes comparisons in it independent of both. Random convolutions respond
to edges and textures of several sizes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldae.utils.seeding import make_generator


class RandomFeatures:
    """Features (B, 8 * the last width) of scans: each of four layers halves the size, then octants are averaged.

    Args:
        widths: channels of the layers.
        seed: of the weights.
    """

    name = "random"

    def __init__(self, widths: tuple[int, ...] = (16, 32, 48, 64), seed: int = 0) -> None:
        self.weights, before = [], 1
        for number, width in enumerate(widths):
            shape = (width, before, 3, 3, 3)
            normal = torch.randn(shape, generator=make_generator(seed, "random features", number))
            self.weights.append(normal * (2 / (27 * before)) ** 0.5)
            before = width

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Features of scans (B, 1, X, Y, Z) in [0, 1]."""
        h = 2 * x.float() - 1
        for weight in self.weights:
            stride = 2 if min(h.shape[2:]) > 2 else 1
            h = functional.leaky_relu(functional.conv3d(h, weight.to(h), stride=stride, padding=1), 0.2)
        return nn.functional.adaptive_avg_pool3d(h, 2).flatten(1)  # (B, 8 C)
