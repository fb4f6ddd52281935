"""A small CNN for slices, for a few hundred scans of some dozen voxels: strided convolutions, then weighted means over
the grid that is left, whose weights are learned.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldae.utils.errors import UserError

GAIN = 4.0  # of what is learned about where to look: Adam's steps are as long for it as for any other weight


class SliceCNN(nn.Module):
    """(N, 1, H, W) -> (N, out_channels).

    It starts as a network with a global average pool, as ConvNeXt is (arXiv 2201.03545), and learns where to look: in
    which place a slice is dark is most of what tells two brains at 4 mm apart.

    Args:
        size: (H, W) of the slices.
        widths: channels after each convolution; each halves H and W.
        out_channels: C of the result.
        looks: how many weighted means.
    """

    def __init__(
        self, size: Sequence[int], widths: Sequence[int] = (16, 32), out_channels: int = 256, looks: int = 16
    ) -> None:
        super().__init__()
        stride = 2 ** len(widths)
        if len(size) != 2 or any(edge % stride for edge in size):
            raise UserError(f"model.encoder.backbone: slices of size {list(size)} do not divide by {stride}")
        self.out_channels = out_channels
        layers: list[nn.Module] = []
        for before, width in zip((1, *widths[:-1]), widths, strict=True):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        grid = (size[0] // stride) * (size[1] // stride)
        self.where = nn.Parameter(torch.zeros(looks, grid))
        self.head = nn.Linear(looks * widths[-1], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, C)."""
        weights = 1 / self.where.shape[1] + GAIN * self.where
        seen = self.layers(x).flatten(2) @ weights.T  # (N, width, looks)
        return self.head(seen.flatten(1))
