"""A small 3D CNN for views of whole scans: strided convolutions and a linear reading, without normalisation.

It is the learned residual beside principal components (components_encoder.py), and an encoder by itself.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldae.models.blocks import run_block


class VolumeCNN(nn.Module):
    """Views of scans (B, C, X, Y, Z) in [0, 1] -> features (B, dim), which are 0 before training.

    It reads the difference from the mean training scan, and its convolutions have no bias: the mean scan has the
    features 0, and what all brains share cannot fill them. The reading is linear in every position, so that where
    something is in the brain counts, and starts at 0, so that y starts as what is beside it.

    Args:
        shape: (C, X, Y, Z) of a view.
        widths: channels after each convolution. Each halves the size of the volume.
        dim: number of features.
    """

    fitted = ("mean", "difference_std")  # buffers that are measured before training, see models/fitted.py
    random_start = False  # whether the features before training depend on random numbers

    def __init__(self, shape: Sequence[int], widths: Sequence[int] = (16, 32), dim: int = 256) -> None:
        super().__init__()
        self.dim = dim
        self.checkpointing = False
        sizes = [int(size) for size in shape[1:]]
        layers: list[nn.Module] = []
        for before, width in zip((int(shape[0]), *widths[:-1]), widths, strict=True):
            layers += [nn.Conv3d(before, width, 3, stride=2, padding=1, bias=False), nn.GELU()]
            sizes = [-(-size // 2) for size in sizes]
        self.layers = nn.Sequential(*layers)
        inputs = widths[-1] * math.prod(sizes)
        # Adam moves all weights of a feature by the same step: divided by the square root of their number, they move
        # the feature by as much in a large volume as in a small one.
        self.gain = 1 / math.sqrt(inputs)
        self.reading = nn.Linear(inputs, dim, bias=False)
        nn.init.zeros_(self.reading.weight)
        self.register_buffer("mean", torch.zeros(1, *map(int, shape)))
        self.register_buffer("difference_std", torch.ones(()))

    @property
    def mean_volume(self) -> Tensor:
        """The mean of the training scans, (1, C, X, Y, Z)."""
        return self.mean

    @torch.no_grad()
    def set_mean_volume(self, mean: Tensor, difference_std: Tensor) -> None:
        """Store the mean of the training scans, (1, C, X, Y, Z), and the root mean square of differences from it."""
        self.mean.copy_(mean)
        self.difference_std.copy_(difference_std)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, dim)."""
        difference = (x - self.mean) / self.difference_std
        return self.reading(self.gain * run_block(self.layers, self.checkpointing, difference).flatten(1))
