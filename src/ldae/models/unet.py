"""The U-Net eps_theta(z_t, t): ADM ("guided diffusion", arXiv 2105.05233) in 3D.

    down    conv3, then per level: residual blocks (attention if due), a down block except at the last
    middle  block, attention, block
    up      per level: residual_blocks + 1 x (join a skip, block, attention if due), an up block except at the top
    out     GroupNorm, SiLU, zeroed conv3

Middle, up and out are one module, `UpPath`: the gradient estimator has its own, conditioned on y, on this U-Net's
features.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldae.models.blocks import Attention, GroupNorm, ResidualBlock, full_precision, run, time_features, zero_module
from ldae.models.cpu_kernels import Conv3d
from ldae.models.sizes import check_divisible
from ldae.models.voxel_prior import Normal, VoxelPrior


class Features(NamedTuple):
    """What the way down leaves of (z_t, t)."""

    h: Tensor  # (B, C, x, y, z), the deepest volume
    skips: tuple[Tensor, ...]  # one a block of the way down, outermost first
    time: Tensor  # (B, 4 base), the embedding of t
    z_t: Tensor  # (B, in_channels, X, Y, Z), what went in
    normal: Normal | None  # what the voxels' prior says of z_t, where there is one


@dataclass(frozen=True)
class Architecture:
    """The U-Net's shape; the gradient estimator takes the same one.

    Args:
        in_channels: of the latent, and of the output.
        base: channels of the top level; level i has base * multipliers[i].
        residual_blocks: a level on the way down; one more on the way up.
        attention_at: downsampling factors (1, 2, 4, ... by level) at which blocks are followed by attention.
        groups: of every GroupNorm; divides every width.
        resample: factor of one halving along x, y, z: (2, 2, 2), or the released weights' (1, 2, 2).
        checkpointing: recompute activations in the backward pass: less memory, a third more time.
        prior: each voxel's own distribution, which the network starts from; None: from nothing, as published.
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
        """Channels of each level."""
        return [self.base * m for m in self.multipliers]

    @property
    def embedding(self) -> int:
        """Width of the embeddings of t and of y."""
        return 4 * self.base

    @property
    def skip_widths(self) -> list[int]:
        """Channels of each skip, outermost first."""
        widths = [self.base]
        for level, width in enumerate(self.widths):
            widths += [width] * self.residual_blocks
            if level + 1 < len(self.widths):
                widths.append(width)
        return widths

    @property
    def strides(self) -> tuple[int, int, int]:
        """By what a latent's sizes must divide."""
        x, y, z = (factor ** (len(self.multipliers) - 1) for factor in self.resample)
        return x, y, z

    def block(self, channels: int, width: int, semantic: bool = False, **resampling: Sequence[int]) -> nn.Module:
        """A residual block; `resampling`: its `downsample` or `upsample`."""
        return ResidualBlock(channels, width, self.embedding, self.groups, self.dropout, semantic, **resampling)

    def stage(self, channels: int, level: int, semantic: bool = False) -> "BlockSequence":
        """A residual block to the width of `level`, with attention if it is due there."""
        width = self.widths[level]
        layers = [self.block(channels, width, semantic)]
        if 2**level in self.attention_at:
            layers.append(self.attention(width))
        return BlockSequence(layers)

    def attention(self, width: int) -> nn.Module:
        """An attention block."""
        return Attention(width, self.heads, self.groups)


class BlockSequence(nn.ModuleList):
    """Blocks in a row, after a skip has been joined to their input."""

    def forward(self, h: Tensor, skip: Tensor | None, time: Tensor, semantic: Tensor | None = None) -> Tensor:
        """(B, C, X, Y, Z)[, skip (B, C', X, Y, Z)] -> (B, C'', X', Y', Z')."""
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        for layer in self:
            h = layer(h, time, semantic)
        return h


class UpPath(nn.Module):
    """Middle, way up and output. With `semantic`, every residual block is conditioned on time AND y."""

    def __init__(self, shape: Architecture, semantic: bool = False) -> None:
        super().__init__()
        channels = shape.widths[-1]
        ends = [shape.block(channels, channels, semantic) for _ in range(2)]
        self.middle = BlockSequence([ends[0], shape.attention(channels), ends[1]])
        self.up = nn.ModuleList()
        skips = shape.skip_widths
        for level in reversed(range(len(shape.widths))):
            for _ in range(shape.residual_blocks + 1):
                self.up.append(shape.stage(channels + skips.pop(), level, semantic))
                channels = shape.widths[level]
            if level > 0:
                self.up[-1].append(shape.block(channels, channels, semantic, upsample=shape.resample))
        self.norm = GroupNorm(shape.groups, channels)
        self.conv = zero_module(Conv3d(channels, shape.in_channels, 3, padding=1))

    def forward(self, features: Features, semantic: Tensor | None, checkpointing: bool) -> Tensor:
        """Features[, embedding of y (B, 4 base)] -> (B, in_channels, X, Y, Z)."""
        h, time = features.h, features.time
        h = run(self.middle, checkpointing, h, None, time, semantic)
        for stage, skip in zip(self.up, reversed(features.skips), strict=True):
            h = run(stage, checkpointing, h, skip, time, semantic)
        # In float32: near t = T the rounding of a 16-bit output is several percent of what y can explain.
        with full_precision(h):
            return self.conv(F.silu(self.norm(h.float())))


class UNet(nn.Module):
    """(z_t, t) -> (B, in_channels, X, Y, Z), what the parameterisation predicts. Arguments: see Architecture."""

    __signature__ = inspect.signature(Architecture)  # so that a config's keys can be checked before it is built

    def __init__(self, **architecture: Any) -> None:
        super().__init__()
        shape = Architecture(**architecture)
        self.architecture = shape
        self.checkpointing = shape.checkpointing
        self.prior = shape.prior
        self.time = nn.Sequential(
            nn.Linear(shape.base, shape.embedding), nn.SiLU(), nn.Linear(shape.embedding, shape.embedding)
        )
        self.input = Conv3d(shape.in_channels, shape.base, 3, padding=1)
        self.down = nn.ModuleList()
        channels = shape.base
        for level, width in enumerate(shape.widths):
            for _ in range(shape.residual_blocks):
                self.down.append(shape.stage(channels, level))
                channels = width
            if level + 1 < len(shape.widths):
                self.down.append(BlockSequence([shape.block(width, width, downsample=shape.resample)]))
        self.path = UpPath(shape)

    @property
    def strides(self) -> tuple[int, int, int]:
        """By what a latent's sizes must divide."""
        return self.architecture.strides

    def features(self, z_t: Tensor, t: Tensor) -> Features:
        """The way down: z_t (B, C, X, Y, Z), t (B,), which may be fractional.

        Raises:
            UserError: the latent's sizes do not divide by `strides`.
        """
        check_divisible(z_t.shape[2:], self.strides, "latent")
        time = self.time(time_features(t, self.architecture.base))  # (B, 4 base)
        normal = None if self.prior is None else self.prior(z_t, t)
        h = self.input(z_t if normal is None else normal.unit.to(z_t.dtype))
        skips = [h]
        for stage in self.down:
            h = run(stage, self.checkpointing, h, None, time)
            skips.append(h)
        return Features(h, tuple(skips), time, z_t, normal)

    def head(self, features: Features) -> Tensor:
        """Middle, way up and output."""
        output, normal = self.path(features, None, self.checkpointing), features.normal
        return output if normal is None else normal.expected + normal.deviation * output

    def forward(self, z_t: Tensor, t: Tensor) -> Tensor:
        """head(features(z_t, t))."""
        return self.head(self.features(z_t, t))
