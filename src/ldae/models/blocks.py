"""What the U-Net and the gradient estimator are made of: the residual, resampling and attention blocks of ADM in 3D
(arXiv 2105.05233, section 3; adaptive group normalisation: its equation 3).

Volumes are (B, C, X, Y, Z), embeddings of time and of y (B, E). Nothing here breaks the channels_last_3d layout.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldae.models.cpu_kernels import Conv3d, EnlargingConv3d
from ldae.models.group_norm import has_few_large_groups, split_group_norm

MAX_PERIOD = 10_000.0


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of `x`: operations compute in the dtype of what they are given."""
    return torch.autocast(x.device.type, enabled=False)


def zero_module(module: nn.Module) -> nn.Module:
    """The module with zero parameters: a branch that starts as nothing, an output that starts at 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def time_features(t: Tensor, width: int) -> Tensor:
    """Sinusoid of t (B,), which may be fractional: half cosines, then half sines; (B, width) float32."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(MAX_PERIOD) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def run(module: nn.Module, checkpointing: bool, *inputs: Any) -> Any:
    """module(*inputs); with checkpointing its activations are computed again in the backward pass instead of kept."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(module, *inputs, use_reentrant=False)
    return module(*inputs)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm whose output has the input's dtype.

    Under autocast on a GPU, PyTorch's own returns float32, so that all that follows up to the next convolution moves
    twice the memory. The kernel sums in float32 in any case.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape and dtype."""
        # PyTorch's CPU kernel (2.13) crashes in channels_last when it need not compute the input's gradient, as for
        # features of the frozen trunk.
        if x.device.type == "cpu" and torch.is_grad_enabled() and self.weight.requires_grad and not x.requires_grad:
            x = x.detach().requires_grad_()
        with full_precision(x):
            if has_few_large_groups(x, self.num_groups):
                return split_group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Modulation(nn.Module):
    """SiLU, Linear: an embedding (B, E) to a scale and a shift, (B, C) each."""

    def __init__(self, embedding: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding, 2 * channels)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift."""
        return self.linear(F.silu(embedding)).chunk(2, dim=1)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv3; AdaGN, SiLU, dropout, zeroed conv3; plus the input, through conv1 where widths differ.

    Args:
        channels, out_channels: width of the input and of the output.
        embedding: width of the embeddings of time and y.
        semantic: whether the block is conditioned on y besides time.
        downsample, upsample: factors along x, y, z of an average pooling or of a nearest-neighbour enlargement of both
            branches before their first convolution; at most one of them.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        embedding: int,
        groups: int,
        dropout: float,
        semantic: bool = False,
        downsample: Sequence[int] | None = None,
        upsample: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, channels)
        self.downsample = nn.Identity() if downsample is None else nn.AvgPool3d(tuple(downsample))
        self.upsamples = upsample is not None
        self.conv1 = (
            EnlargingConv3d(channels, out_channels, upsample)
            if self.upsamples
            else Conv3d(channels, out_channels, 3, padding=1)
        )
        self.time = Modulation(embedding, out_channels)
        self.semantic = Modulation(embedding, out_channels) if semantic else None
        self.norm2 = GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_module(Conv3d(out_channels, out_channels, 3, padding=1))
        same = channels == out_channels
        self.shortcut = nn.Identity() if same else Conv3d(channels, out_channels, 1)

    def _modulated(self, h: Tensor, time: Tensor, semantic: Tensor | None) -> Tensor:
        """(1 + scale_y) (h (1 + scale_t) + shift_t) + shift_y, as one scale and one shift of the volume."""
        scale, shift = self.time(time)
        scale = 1 + scale
        if self.semantic is not None:
            scale_y, shift_y = self.semantic(semantic)
            scale, shift = scale * (1 + scale_y), shift * (1 + scale_y) + shift_y
        return torch.addcmul(shift[..., None, None, None], h, scale[..., None, None, None])

    def forward(self, x: Tensor, time: Tensor, semantic: Tensor | None = None) -> Tensor:
        """(B, C, X, Y, Z), (B, E)[, (B, E)] -> (B, C', X', Y', Z')."""
        h = self.conv1(self.downsample(F.silu(self.norm1(x))))
        h = F.silu(self._modulated(self.norm2(h), time, semantic))
        x = self.conv1.upsample(x) if self.upsamples else self.downsample(x)
        return self.shortcut(x) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """GroupNorm, one projection to q, k, v, softmax attention over all voxels, zeroed projection; added to the input.

    Takes and ignores embeddings, so that it stands in one row with residual blocks.
    """

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = GroupNorm(groups, channels)
        # 1x1 convolutions on (B, L, C), which is how channels_last_3d lies in memory.
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = zero_module(nn.Linear(channels, channels))

    def forward(self, x: Tensor, time: Tensor | None = None, semantic: Tensor | None = None) -> Tensor:
        """(B, C, X, Y, Z) -> the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, L, C)
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, C / heads)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)  # (B, L, C)
        return x + self.projection(mixed).transpose(1, 2).unflatten(2, x.shape[2:])
