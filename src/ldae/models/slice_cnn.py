"""A small CNN for slices that keeps where things are: strided convolutions, and a Linear over the grid that is left.

For slices of some dozen voxels and a few hundred scans: a global average pool, as ConvNeXt has it, would throw away in
which place a slice is dark, which is most of what tells two brains at 4 mm apart.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from ldae.errors import UserError


class SliceCNN(nn.Module):
    """(N, 1, H, W) -> (N, out_channels).

    Args:
        size: (H, W) of the slices.
        widths: channels after each convolution; each halves H and W.
        out_channels: C of the result.
    """

    def __init__(self, size: Sequence[int], widths: Sequence[int] = (16, 32, 32), out_channels: int = 256) -> None:
        super().__init__()
        stride = 2 ** len(widths)
        if len(size) != 2 or any(edge % stride for edge in size):
            raise UserError(f"model.encoder.backbone: slices of size {list(size)} do not divide by {stride}")
        self.out_channels = out_channels
        layers: list[nn.Module] = []
        for before, width in zip((1, *widths[:-1]), widths, strict=True):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GELU()]
        grid = (size[0] // stride) * (size[1] // stride)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1] * grid, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, C)."""
        return self.layers(x)
