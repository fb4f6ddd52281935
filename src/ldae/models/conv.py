"""Conv3d that PyTorch computes with oneDNN on a CPU, whatever the volume's size."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# PyTorch computes a float32 convolution of one sample with oneDNN only where N * C * X * Y is larger, or where it has
# groups (2.13, aten/src/ATen/native/Convolution.cpp, use_mkldnn); smaller ones go through im2col, twice as slow.
SMALLEST = 20480


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


def with_onednn(module: nn.Module) -> nn.Module:
    """`module` with every nn.Conv3d in it turned into a Conv3d; parameters and names stay."""
    for child in module.modules():
        if type(child) is nn.Conv3d:
            child.__class__ = Conv3d
    return module
