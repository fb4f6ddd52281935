"""Convolutions as a CPU computes them fastest: with oneDNN whatever the volume's size, and without the multiplications
that nearest-neighbour enlargement repeats."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# PyTorch computes a float32 convolution of one sample with oneDNN only where N * C * X * Y is larger, or where it has
# groups (2.13, aten/src/ATen/native/Convolution.cpp, use_mkldnn); smaller ones go through im2col, twice as slow.
SMALLEST = 20480
# Below these many voxels, reading the larger kernel takes longer than the multiplications that it saves.
FEWEST = 512


class Conv3d(nn.Conv3d):
    """nn.Conv3d; a single small volume on a CPU is convolved in two groups of output channels that both read all of its
    channels: the same sums. Of an odd number of output channels the last is computed twice."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._slow(x):
            return super()._conv_forward(x, weight, bias)
        if self.out_channels % 2:
            weight, bias = (part if part is None else torch.cat([part, part[-1:]]) for part in (weight, bias))
        twice = F.conv3d(torch.cat([x, x], dim=1), weight, bias, self.stride, self.padding, self.dilation, groups=2)
        return twice[:, : self.out_channels]

    def _slow(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and len(x) == 1
            and x.dtype is torch.float32
            and not torch.is_autocast_enabled("cpu")
            and self.groups == 1
            and self.padding_mode == "zeros"
            and self.kernel_size[-1] > 1
            and x.shape[1:4].numel() <= SMALLEST
        )


class EnlargingConv3d(Conv3d):
    """A 3x3x3 convolution, padded by 1, of x enlarged along each axis by a factor (nearest neighbour).

    Equal voxels meet sums of the kernel's planes: on a CPU, a transposed convolution with those sums (kernel 4, stride
    2 along a doubled axis) gives the same from the small volume, with 8 multiplications instead of 27.
    """

    factors: tuple[int, int, int]

    def __init__(self, channels: int, out_channels: int, factors: Sequence[int]) -> None:
        super().__init__(channels, out_channels, 3, padding=1)
        self.factors = tuple(factors)

    @classmethod
    def of(cls, conv: nn.Conv3d, factors: Sequence[int]) -> "EnlargingConv3d":
        """A convolution that followed an enlargement, turned into both; its parameters stay."""
        conv.__class__ = cls
        conv.factors = tuple(factors)
        return conv

    def upsample(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z), each axis enlarged by its factor."""
        return F.interpolate(x, scale_factor=tuple(float(f) for f in self.factors), mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C', factor X, factor Y, factor Z)."""
        if not self._pays(x):
            return super().forward(self.upsample(x))
        return F.conv_transpose3d(x, self._sums(), self.bias, stride=self.factors, padding=1)

    def _pays(self, x: Tensor) -> bool:
        plain = x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")
        return x.device.type == "cpu" and plain and len(x) * x.shape[2:].numel() >= FEWEST

    def _sums(self) -> Tensor:
        """The transposed convolution's kernel, (C, C', 2 + factor, ...): sums of neighbouring planes."""
        kernel = self.weight.flip(2, 3, 4).transpose(0, 1)
        for axis, factor in enumerate(self.factors):
            around = [[0] * 6 for _ in range(factor)]
            for shift, padding in enumerate(around):
                padding[4 - 2 * axis : 6 - 2 * axis] = shift, factor - 1 - shift
            kernel = sum(F.pad(kernel, padding) for padding in around)
        return kernel


def with_onednn(module: nn.Module) -> nn.Module:
    """`module` with every nn.Conv3d in it turned into a Conv3d; parameters and names stay."""
    for child in module.modules():
        if type(child) is nn.Conv3d:
            child.__class__ = Conv3d
    return module
