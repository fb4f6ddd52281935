"""The blocks that the U-Net and the gradient estimator are made of: those of ADM in 3D (arXiv 2105.05233, section 3).

Volumes are (B, C, X, Y, Z); the embeddings of the timestep and of y are (B, E).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MAX_PERIOD = 10_000.0


def full_precision(x: Tensor) -> torch.autocast:
    """A context that switches autocast off on the device of `x`: operations compute in the dtype of their inputs."""
    return torch.autocast(x.device.type, enabled=False)


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of `module` to zero and return it. A branch that ends in it adds nothing before training."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def time_features(t: Tensor, width: int) -> Tensor:
    """Sinusoidal features of the timestep (arXiv 1706.03762, section 3.5): first the cosines, then the sines.

    Args:
        t: (B,) timesteps, which may be fractional.
        width: number of features, even.

    Returns:
        (B, width) float32.
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(MAX_PERIOD) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def run_block(block: nn.Module, checkpointing: bool, *inputs: object) -> Tensor:
    """block(*inputs). With `checkpointing`, the backward pass recomputes the block's activations instead of storing
    them."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class Modulation(nn.Module):
    """SiLU and Linear, from an embedding (B, E) to a scale and a shift of each channel, (B, C) each."""

    def __init__(self, embedding: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(embedding, 2 * channels)

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift."""
        return self.linear(F.silu(embedding)).chunk(2, dim=1)


class ResidualBlock(nn.Module):
    """Two convolutions, conditioned on the timestep and, in the gradient estimator, on y.

    GroupNorm, SiLU, resampling, conv3; adaptive GroupNorm (`modulate`), SiLU, dropout, zero-initialised conv3. The
    input is added, after the same resampling and a conv1 where the number of channels changes.

    Args:
        channels, out_channels: number of channels of the input and of the output.
        embedding: width E of the embeddings of the timestep and of y.
        semantic: whether the block is conditioned on y as well as on the timestep.
        downsample, upsample: factors along x, y and z of average pooling or of nearest-neighbour upsampling. At most
            one of the two is given.
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
        self.norm1 = nn.GroupNorm(groups, channels)
        self.resample: nn.Module = nn.Identity()
        if downsample is not None:
            self.resample = nn.AvgPool3d(tuple(downsample))
        elif upsample is not None:
            self.resample = nn.Upsample(scale_factor=tuple(float(factor) for factor in upsample), mode="nearest")
        self.conv1 = nn.Conv3d(channels, out_channels, 3, padding=1)
        self.time = Modulation(embedding, out_channels)
        self.semantic = Modulation(embedding, out_channels) if semantic else None
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_module(nn.Conv3d(out_channels, out_channels, 3, padding=1))
        same = channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv3d(channels, out_channels, 1)

    def modulation(self, time: Tensor, semantic: Tensor | None) -> tuple[Tensor, Tensor]:
        """The adaptive part of AdaGN: a factor and a shift of each channel of the normalised volume h, (B, C') each.

        With y: (1 + scale_y) (h (1 + scale_t) + shift_t) + shift_y (PDAE, arXiv 2212.12990, section 3.3). Without y:
        h (1 + scale_t) + shift_t (arXiv 2105.05233, equation 3).
        """
        scale, shift = self.time(time)
        factor = 1 + scale
        if self.semantic is not None:
            # The two affine maps are joined into one, so that the volume is read and written only once.
            scale_y, shift_y = self.semantic(semantic)
            factor, shift = factor * (1 + scale_y), shift * (1 + scale_y) + shift_y
        return factor, shift

    def forward(self, x: Tensor, time: Tensor, semantic: Tensor | None = None) -> Tensor:
        """x (B, C, X, Y, Z), time (B, E), semantic (B, E) -> (B, C', X', Y', Z')."""
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        factor, shift = (value[..., None, None, None] for value in self.modulation(time, semantic))
        h = F.silu(torch.addcmul(shift, self.norm2(h), factor))  # norm2(h) factor + shift
        return self.shortcut(self.resample(x)) + self.conv2(self.dropout(h))


class Attention(nn.Module):
    """Self-attention over all voxels: softmax(q k^T / sqrt(d)) v, between a GroupNorm and a zero-initialised conv1.

    The result is added to the input. It takes and ignores the embeddings, so that it can follow a residual block in a
    sequence.
    """

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        # Convolutions of size 1, written as Linear because the voxels are already laid out as (B, L, C).
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = zero_module(nn.Linear(channels, channels))

    def forward(self, x: Tensor, time: Tensor | None = None, semantic: Tensor | None = None) -> Tensor:
        """(B, C, X, Y, Z) -> the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, L, C)
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, C / heads)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)  # (B, L, C)
        return x + self.projection(mixed).transpose(1, 2).unflatten(2, x.shape[2:])
