"""The gradient estimator G_psi(z_t, t, y) (PDAE, arXiv 2212.12990, section 3.3): what y adds to the U-Net's estimate.

It reuses the frozen U-Net's time embedding, skips and deepest features, and has its own way up, shaped as the U-Net's,
whose blocks see y besides the time.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldae.models.blocks import full_precision, zero_module
from ldae.models.unet import Architecture, Features, UNet, UpPath


def cosine_modes(shape: Sequence[int], count: int, device: torch.device) -> Tensor:
    """The `count`^3 lowest products of cosines on a grid, (count^3, X, Y, Z): cos(pi i x) cos(pi j y) cos(pi k z)."""
    axes = []
    for size in shape:
        centres = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
        axes.append(torch.cos(math.pi * torch.arange(count, device=device)[:, None] * centres))
    x, y, z = axes
    return torch.einsum("ix,jy,kz->ijkxyz", x, y, z).flatten(0, 2)


class SpatialMap(nn.Module):
    """y to a smooth volume, linearly, times a factor that depends on t; exactly 0 before training.

    Coefficients of cosine modes for every channel: the grid may have any size.
    """

    def __init__(self, semantic_dim: int, embedding: int, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self._grids: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        self.coefficients = zero_module(nn.Linear(semantic_dim, channels * modes**3))
        self.gate = nn.Linear(embedding, channels)

    def forward(self, y: Tensor, time: Tensor, shape: Sequence[int]) -> Tensor:
        """y (B, D), embedding of t (B, E) and a grid (X, Y, Z) to (B, C, X, Y, Z)."""
        # In float32, as all that is added to the network's output.
        with full_precision(y):
            gate = 1 + self.gate(F.silu(time.float()))
            # 768 numbers of size 1 that an optimiser's step all moves alike would throw the map far off.
            coefficients = self.coefficients(y.float() / math.sqrt(y.shape[1])).unflatten(1, (gate.shape[1], -1))
            modes = self._cosines(tuple(shape), y.device)
            return torch.einsum("bcm,mxyz->bcxyz", coefficients * gate[..., None], modes)

    def _cosines(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The modes on this grid, computed once."""
        if (shape, device) not in self._grids:
            with torch.inference_mode(False), torch.no_grad():  # they may be part of a training step later
                self._grids[shape, device] = cosine_modes(shape, self.modes, device)
        return self._grids[shape, device]


class InputGain(nn.Module):
    """z_t times a factor of t, one a channel; exactly 0 before training.

    Knowing y, latents spread less. Around a mean m that y tells, with variance s^2, v = k z_t - (alpha k + sigma) m,
    k = alpha sigma (1 - s^2) / (alpha^2 s^2 + sigma^2): a smaller spread changes the factor of z_t as well as the map.
    Without it codes shrink: the inversion takes what is left for the little of a wide distribution.
    """

    def __init__(self, embedding: int, channels: int) -> None:
        super().__init__()
        self.factor = zero_module(nn.Linear(embedding, channels))

    def forward(self, z_t: Tensor, time: Tensor) -> Tensor:
        """z_t (B, C, X, Y, Z) and embedding of t (B, E) to (B, C, X, Y, Z)."""
        with full_precision(z_t):
            return self.factor(F.silu(time.float()))[..., None, None, None] * z_t.float()


class GradientEstimator(nn.Module):
    """(features of (z_t, t), y) -> G, (B, in_channels, X, Y, Z); exactly 0 before training.

    Args:
        semantic_dim: width of y.
        modes: cosine modes an axis of a smooth map of y that is added to G, and z_t times a factor of t; 0: neither, as
            published. The blocks scale and shift whole channels by y, which can say what but hardly where; through
            them alone, z_0 errors with the own and with another's y stay equal to four digits for hundreds of steps.
        start_from_unet: whether stage 3 starts this way up as a copy of the trained U-Net's (`start_from`); False, as
            published: from its own random start.
        unet: the arguments of the U-Net whose features it takes (see Architecture).
    """

    def __init__(self, semantic_dim: int = 768, modes: int = 0, start_from_unet: bool = False, **unet: Any) -> None:
        super().__init__()
        self.start_from_unet = start_from_unet
        shape = Architecture(**unet)
        self.checkpointing = shape.checkpointing
        self.semantic = nn.Linear(semantic_dim, shape.embedding)
        self.path = UpPath(shape, semantic=True)
        self.map = SpatialMap(semantic_dim, shape.embedding, shape.in_channels, modes) if modes else None
        self.narrowing = InputGain(shape.embedding, shape.in_channels) if modes else None

    @torch.no_grad()
    def start_from(self, unet: UNet) -> None:
        """Start the way up as a copy of the trained U-Net's, but for the last convolution, which stays zero: G is 0.

        As built, each block's last convolution is zero too: y would reach G through two zeros in a row.
        """
        own, source = self.path.state_dict(), unet.path.state_dict()
        for name in source.keys() - {"conv.weight", "conv.bias"}:
            own[name].copy_(source[name])

    def forward(self, features: Features, y: Tensor) -> Tensor:
        """Features of the U-Net and y (B, semantic_dim) to G."""
        gradient, normal = self.path(features, self.semantic(y), self.checkpointing), features.normal
        if self.map is not None:
            z_t = features.z_t if normal is None else normal.unit
            linear = self.map(y, features.time, gradient.shape[2:]) + self.narrowing(z_t, features.time)
            gradient = gradient + linear
        return gradient if normal is None else normal.deviation * gradient
