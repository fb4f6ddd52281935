"""A small CNN for the slices of a few hundred scans of some dozen voxels a side: strided convolutions, then pooling
with learned weights. An alternative to ConvNeXt as the semantic encoder's backbone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldae.utils.errors import UserError

# Factor of the learned part of the pooling weights, which are small numbers: Adam's steps are as long for them as for
# any other weight.
POOLING_GAIN = 4.0


class SliceCNN(nn.Module):
    """Slices (N, channels, H, W) -> features (N, out_channels).

    Before training every pooling is the global average pool of ConvNeXt (arXiv 2201.03545). Training learns where to
    average: the position of the dark areas in a slice is most of what distinguishes two brains at 4 mm.

    Args:
        size: (H, W) of the slices.
        widths: number of channels after each convolution. Each halves H and W.
        out_channels: number of features.
        num_poolings: number of weighted averages over the positions that are left after the convolutions.
        channels: number of channels of the slices.
    """

    def __init__(
        self,
        size: Sequence[int],
        widths: Sequence[int] = (16, 32),
        out_channels: int = 256,
        num_poolings: int = 16,
        channels: int = 1,
    ) -> None:
        super().__init__()
        stride = 2 ** len(widths)
        if len(size) != 2 or any(edge % stride for edge in size):
            raise UserError(
                f"model.encoder.backbone: slices of size {list(size)} do not divide by {stride}; choose data.shape so "
                "that they do, or fewer widths"
            )
        self.out_channels = out_channels
        layers: list[nn.Module] = []
        for before, width in zip((channels, *widths[:-1]), widths, strict=True):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        positions = (size[0] // stride) * (size[1] // stride)
        # What is added to the weights of the global average. (Stored under this name.)
        self.where = nn.Parameter(torch.zeros(num_poolings, positions))
        self.head = nn.Linear(num_poolings * widths[-1], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) -> (N, out_channels)."""
        weights = 1 / self.where.shape[1] + POOLING_GAIN * self.where  # (poolings, positions)
        pooled = self.layers(x).flatten(2) @ weights.T  # (N, width, poolings)
        return self.head(pooled.flatten(1))
