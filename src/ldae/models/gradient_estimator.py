"""The gradient estimator G_psi(z_t, t, y): what y adds to the U-Net's prediction (PDAE, arXiv 2212.12990, section 3.3).

It reuses the time embedding, the skips and the deepest features of the frozen U-Net. Its own middle, up path and output
have the shape of the U-Net's, but their blocks are conditioned on y as well as on t.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldae.models.blocks import full_precision, zero_module
from ldae.models.unet import Architecture, Features, UNet, UpPath


class GradientEstimator(nn.Module):
    """(features of (z_t, t), y) -> G (B, in_channels, X, Y, Z), which is exactly 0 before training.

    Args:
        semantic_dim: width of y.
        modes: if not 0, two linear terms are added to G: a smooth map of y with so many cosine modes along each
            axis (`SpatialMap`), and z_t times a factor that depends on t (`InputGain`). The blocks scale and shift
            whole
            channels by y, which tells what to change but hardly where: with them alone, the z_0 errors with the scan's
            own y and with that of another scan are equal to four digits for hundreds of steps. 0: neither, as
            published.
        start_from_unet: whether stage 3 starts the up path as a copy of the trained U-Net's (`start_from`). False, as
            published: it starts from random weights.
        unet: the arguments of the U-Net whose features it takes (see Architecture).
    """

    def __init__(self, semantic_dim: int = 768, modes: int = 0, start_from_unet: bool = False, **unet: object) -> None:
        super().__init__()
        self.start_from_unet = start_from_unet
        shape = Architecture(**unet)
        self.checkpointing = shape.checkpointing
        self.semantic = nn.Linear(semantic_dim, shape.embedding)
        self.path = UpPath(shape, semantic=True)
        # Files of weights store the two linear terms under the names `map` and `narrowing`.
        self.map = self.narrowing = None
        if modes:
            self.map = SpatialMap(semantic_dim, shape.embedding, shape.in_channels, modes)
            self.narrowing = InputGain(shape.embedding, shape.in_channels)

    @torch.no_grad()
    def start_from(self, unet: UNet) -> None:
        """Copy the U-Net's middle, up path and output, except for the last convolution, which stays 0 so that G is 0.

        As initialised, the last convolution of every block is 0 as well, so that y could reach G only through two zeros
        in a row.
        """
        own, source = self.path.state_dict(), unet.path.state_dict()
        for name in source.keys() - {"conv.weight", "conv.bias"}:
            own[name].copy_(source[name])

    def forward(self, features: Features, y: Tensor) -> Tensor:
        """Features of the U-Net and y (B, semantic_dim) -> G (B, in_channels, X, Y, Z)."""
        gradient, prior = self.path(features, self.semantic(y), self.checkpointing), features.prior
        if self.map is not None:
            z_t = features.z_t if prior is None else prior.standardised
            gradient = gradient + (self.map(y, features.time, z_t.shape[2:]) + self.narrowing(z_t, features.time))
        return gradient if prior is None else prior.std * gradient


class SpatialMap(nn.Module):
    """A smooth volume that depends linearly on y, times a factor that depends on t. It is exactly 0 before training.

    y determines the coefficients of cosine modes for every channel, so that the volume may have any size.
    """

    def __init__(self, semantic_dim: int, embedding: int, channels: int, modes: int) -> None:
        super().__init__()
        self.modes = modes
        self.coefficients = zero_module(nn.Linear(semantic_dim, channels * modes**3))
        self.gate = nn.Linear(embedding, channels)
        self._grids: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def forward(self, y: Tensor, time: Tensor, shape: Sequence[int]) -> Tensor:
        """y (B, D), the embedding of t (B, E) and the size (X, Y, Z) -> (B, C, X, Y, Z)."""
        with full_precision(y):  # in float32, as all that is added to the network's output
            gate = 1 + self.gate(F.silu(time.float()))
            # Each step of the optimiser moves all 768 weights of a coefficient alike, which would change the map by far
            # too much if they were not divided by the square root of their number.
            coefficients = self.coefficients(y.float() / math.sqrt(y.shape[1])).unflatten(1, (gate.shape[1], -1))
            modes = self._cosine_modes(tuple(shape), y.device)
            return torch.einsum("bcm,mxyz->bcxyz", coefficients * gate[..., None], modes)

    def _cosine_modes(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The modes for volumes of this size, computed once."""
        if (shape, device) not in self._grids:
            # A tensor made in inference mode could not take part in a later training step.
            with torch.inference_mode(False), torch.no_grad():
                self._grids[shape, device] = cosine_modes(shape, self.modes, device)
        return self._grids[shape, device]


def cosine_modes(shape: Sequence[int], count: int, device: torch.device) -> Tensor:
    """The `count`^3 lowest products of cosines, cos(pi i x) cos(pi j y) cos(pi k z), on a grid: (count^3, X, Y, Z)."""
    axes = []
    for size in shape:
        centres = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) / size
        axes.append(torch.cos(math.pi * torch.arange(count, device=device)[:, None] * centres))
    x, y, z = axes
    return torch.einsum("ix,jy,kz->ijkxyz", x, y, z).flatten(0, 2)


class InputGain(nn.Module):
    """z_t times a factor of each channel that depends on t. It is exactly 0 before training.

    Given y, latents vary less. If y tells their mean m and their variance around it is s^2, the best prediction is
    v = k z_t - (alpha k + sigma) m with k = alpha sigma (1 - s^2) / (alpha^2 s^2 + sigma^2), so that a smaller variance
    changes the factor of z_t as well as the map of y. Without this term, inversion encodes what y does not explain as
    if it came from the wider unconditional distribution, and the codes are too narrow.
    """

    def __init__(self, embedding: int, channels: int) -> None:
        super().__init__()
        self.factor = zero_module(nn.Linear(embedding, channels))

    def forward(self, z_t: Tensor, time: Tensor) -> Tensor:
        """z_t (B, C, X, Y, Z) and the embedding of t (B, E) -> (B, C, X, Y, Z)."""
        with full_precision(z_t):
            return self.factor(F.silu(time.float()))[..., None, None, None] * z_t.float()
