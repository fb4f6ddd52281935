"""The U-Net eps_theta(z_t, t): that of ADM ("guided diffusion", arXiv 2105.05233) in 3D.

    down    conv3, then per level: residual_blocks x (block, attention where it is due), a downsampling block except at
            the last
    middle  block, attention, block
    up      per level: residual_blocks + 1 x (concatenate a skip, block, attention where it is due), an upsampling block
            except at the top
    out     GroupNorm, SiLU, zero-initialised conv3

Middle, up and out are one module, `UpPath`, because the gradient estimator has another one, which is conditioned on y,
on the features of this U-Net.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldae.models.blocks import Attention, ResidualBlock, full_precision, run_block, time_features, zero_module
from ldae.models.sizes import check_divisible
from ldae.models.voxel_prior import PriorPrediction, VoxelPrior


class Features(NamedTuple):
    """What the down path computes of (z_t, t)."""

    h: Tensor  # (B, C, x, y, z), the deepest features
    skips: tuple[Tensor, ...]  # the output of every block of the down path, outermost first
    time: Tensor  # (B, 4 base), the embedding of t
    z_t: Tensor  # (B, in_channels, X, Y, Z), the input
    prior: PriorPrediction | None  # what the voxel prior predicts of z_t, if the U-Net has one


@dataclass(frozen=True)
class Architecture:
    """The shape of the U-Net, which the gradient estimator shares.

    Args:
        in_channels: number of channels of the latent and of the output.
        base: number of channels of the top level. Level i has base * multipliers[i].
        multipliers: one per level.
        residual_blocks: number of residual blocks of a level on the way down. There is one more on the way up.
        attention_at: downsampling factors (1, 2, 4, ... by level) of the levels whose blocks are followed by attention.
        heads: heads of the attention.
        groups: number of groups of every GroupNorm. It divides the number of channels of all levels.
        resample: factor of a downsampling along x, y and z: (2, 2, 2), or (1, 2, 2) as published.
        checkpointing: recompute activations in the backward pass. This takes less memory and a third more time.
        prior: distribution of each latent voxel, from which the network predicts only the difference (voxel_prior.py).
            None, as published.
    """

    in_channels: int = 3
    base: int = 256
    multipliers: Sequence[int] = (1, 2, 3)
    residual_blocks: int = 2
    attention_at: Sequence[int] = (2, 4)
    heads: int = 1
    dropout: float = 0.1
    groups: int = 32
    resample: Sequence[int] = (2, 2, 2)
    checkpointing: bool = False
    prior: VoxelPrior | None = None

    @property
    def widths(self) -> list[int]:
        """Number of channels of each level."""
        return [self.base * m for m in self.multipliers]

    @property
    def embedding(self) -> int:
        """Width of the embeddings of t and of y."""
        return 4 * self.base

    @property
    def skip_widths(self) -> list[int]:
        """Number of channels of each skip, outermost first."""
        widths = [self.base]
        for level, width in enumerate(self.widths):
            widths += [width] * self.residual_blocks
            if level + 1 < len(self.widths):
                widths.append(width)
        return widths

    @property
    def strides(self) -> tuple[int, int, int]:
        """The sizes of a latent must divide by these, along x, y and z."""
        x, y, z = (factor ** (len(self.multipliers) - 1) for factor in self.resample)
        return x, y, z

    def block(self, channels: int, width: int, semantic: bool = False, **resampling: Sequence[int]) -> ResidualBlock:
        """A residual block from `channels` to `width` channels. `resampling`: its `downsample` or `upsample`."""
        return ResidualBlock(channels, width, self.embedding, self.groups, self.dropout, semantic, **resampling)

    def level_blocks(self, channels: int, level: int, semantic: bool = False) -> "BlockSequence":
        """A residual block to the number of channels of `level`, and attention if it is due there."""
        width = self.widths[level]
        blocks: list[nn.Module] = [self.block(channels, width, semantic)]
        if 2**level in self.attention_at:
            blocks.append(self.attention(width))
        return BlockSequence(blocks)

    def attention(self, width: int) -> Attention:
        """An attention block for `width` channels."""
        return Attention(width, self.heads, self.groups)


class BlockSequence(nn.ModuleList):
    """Blocks that follow each other, after a skip has been concatenated to their input."""

    def forward(self, h: Tensor, skip: Tensor | None, time: Tensor, semantic: Tensor | None = None) -> Tensor:
        """h (B, C, X, Y, Z), skip (B, C', X, Y, Z) or None -> (B, C'', X', Y', Z')."""
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        for block in self:
            h = block(h, time, semantic)
        return h


class UpPath(nn.Module):
    """Middle, up path and output. With `semantic`, every residual block is conditioned on y as well as on t."""

    def __init__(self, shape: Architecture, semantic: bool = False) -> None:
        super().__init__()
        channels = shape.widths[-1]
        first, last = (shape.block(channels, channels, semantic) for _ in range(2))
        self.middle = BlockSequence([first, shape.attention(channels), last])
        self.up = nn.ModuleList()
        skips = shape.skip_widths
        for level in reversed(range(len(shape.widths))):
            for _ in range(shape.residual_blocks + 1):
                self.up.append(shape.level_blocks(channels + skips.pop(), level, semantic))
                channels = shape.widths[level]
            if level > 0:
                self.up[-1].append(shape.block(channels, channels, semantic, upsample=shape.resample))
        self.norm = nn.GroupNorm(shape.groups, channels)
        self.conv = zero_module(nn.Conv3d(channels, shape.in_channels, 3, padding=1))

    def forward(self, features: Features, semantic: Tensor | None, checkpointing: bool) -> Tensor:
        """Features and, where they count, the embedding of y (B, 4 base) -> (B, in_channels, X, Y, Z)."""
        h, time = features.h, features.time
        h = run_block(self.middle, checkpointing, h, None, time, semantic)
        for blocks, skip in zip(self.up, reversed(features.skips), strict=True):
            h = run_block(blocks, checkpointing, h, skip, time, semantic)
        # In float32, because near t = T the rounding of a 16-bit output is several percent of what y can explain.
        with full_precision(h):
            return self.conv(F.silu(self.norm(h.float())))


class UNet(nn.Module):
    """(z_t, t) -> the quantity that the parameterisation predicts, (B, in_channels, X, Y, Z).

    The arguments are those of `Architecture`.
    """

    __signature__ = inspect.signature(Architecture)  # lets a config's keys be checked before the network is built

    def __init__(self, **architecture: object) -> None:
        super().__init__()
        shape = Architecture(**architecture)
        self.architecture = shape
        self.checkpointing = shape.checkpointing
        self.prior = shape.prior
        self.time = nn.Sequential(
            nn.Linear(shape.base, shape.embedding), nn.SiLU(), nn.Linear(shape.embedding, shape.embedding)
        )
        self.input = nn.Conv3d(shape.in_channels, shape.base, 3, padding=1)
        self.down = nn.ModuleList()
        channels = shape.base
        for level, width in enumerate(shape.widths):
            for _ in range(shape.residual_blocks):
                self.down.append(shape.level_blocks(channels, level))
                channels = width
            if level + 1 < len(shape.widths):
                self.down.append(BlockSequence([shape.block(width, width, downsample=shape.resample)]))
        self.path = UpPath(shape)

    @property
    def strides(self) -> tuple[int, int, int]:
        """The sizes of a latent must divide by these, along x, y and z."""
        return self.architecture.strides

    def features(self, z_t: Tensor, t: Tensor) -> Features:
        """The down path: z_t (B, C, X, Y, Z) and t (B,), which may be fractional.

        Raises:
            UserError: the sizes of the latent do not divide by `strides`.
        """
        check_divisible(z_t.shape[2:], self.strides, "latent")
        time = self.time(time_features(t, self.architecture.base))  # (B, 4 base)
        prior = None if self.prior is None else self.prior(z_t, t)
        h = self.input(z_t if prior is None else prior.standardised.to(z_t.dtype))
        skips = [h]
        for blocks in self.down:
            h = run_block(blocks, self.checkpointing, h, None, time)
            skips.append(h)
        return Features(h, tuple(skips), time, z_t, prior)

    def head(self, features: Features) -> Tensor:
        """Middle, up path and output: (B, in_channels, X, Y, Z)."""
        output, prior = self.path(features, None, self.checkpointing), features.prior
        return output if prior is None else prior.mean + prior.std * output

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        """head(features(z_t, t))."""
        return self.head(self.features(z_t, t))
