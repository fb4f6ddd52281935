"""GPU kernels: other ways to compute parts of the networks, faster on a GPU in 16 bits and equal up to rounding.

Each is a subclass that takes the place of the class it computes (placement.py). In float32, in compiled code and where
Triton is missing it computes as its parent does. `python -m ldae.bench.gpu_check --parts device/kernels` measures them.
"""

import functools
import importlib.util

import torch
from monai.networks.nets.autoencoderkl import AEKLResBlock
from torch import Tensor, nn
from torch.nn import functional as F

from ldae.models.blocks import ResidualBlock
from ldae.models.convnext import Block, ChannelNorm


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, as it is with PyTorch for CUDA on Linux."""
    return importlib.util.find_spec("triton") is not None


def runs_kernels(x: Tensor) -> bool:
    """Whether volumes like x (B, C, X, Y, Z) are computed channels-last by the kernels."""
    in_16_bits = x.dtype in (torch.bfloat16, torch.float16) and x.ndim == 5
    return x.device.type == "cuda" and in_16_bits and has_triton() and not torch.compiler.is_compiling()


def norm_silu(
    x: Tensor, norm: nn.GroupNorm, factor: Tensor | None = None, shift: Tensor | None = None, silu: bool = True
) -> Tensor:
    """See gpu_norm.norm_modulate_silu."""
    from ldae.models.gpu_norm import norm_modulate_silu  # needs Triton

    return norm_modulate_silu(x, norm, factor, shift, silu)


class ChannelsLastResidualBlock(ResidualBlock):
    """ResidualBlock whose norms, modulation and activations are one operation each."""

    def forward(self, x: Tensor, time: Tensor, semantic: Tensor | None = None) -> Tensor:
        """See ResidualBlock."""
        if not runs_kernels(x):
            return super().forward(x, time, semantic)
        h = self.conv1(self.resample(norm_silu(x, self.norm1)))
        h = norm_silu(h, self.norm2, *self.modulation(time, semantic))
        return self.shortcut(self.resample(x)) + self.conv2(self.dropout(h))


class ChannelsLastAutoencoderBlock(AEKLResBlock):
    """The autoencoder's residual block, whose norms and activations are one operation each."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C', X, Y, Z)."""
        if not runs_kernels(x):
            return super().forward(x)
        h = self.conv1(norm_silu(x, self.norm1))
        return self.nin_shortcut(x) + self.conv2(norm_silu(h, self.norm2))


class GpuGroupNorm(nn.GroupNorm):
    """nn.GroupNorm whose output has the dtype of its input.

    Under autocast on a GPU, nn.GroupNorm returns float32, so that everything up to the next convolution moves twice as
    many bytes. The sums are in float32 in both.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape and dtype."""
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class ChannelsLastGroupNorm(GpuGroupNorm):
    """GpuGroupNorm of channels-last volumes."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape and dtype."""
        return norm_silu(x, self, silu=False) if runs_kernels(x) else super().forward(x)


def runs_slice_kernels(x: Tensor) -> bool:
    """Whether slices like x (N, C, H, W) are computed by the kernels: on a GPU under autocast to 16 bits."""
    autocast = x.device.type == "cuda" and torch.is_autocast_enabled("cuda")
    in_16_bits = autocast and torch.get_autocast_dtype("cuda") != torch.float32
    return in_16_bits and has_triton() and not torch.compiler.is_compiling()


def norm_rows(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """See gpu_layer_norm.layer_norm."""
    from ldae.models.gpu_layer_norm import layer_norm  # needs Triton

    return layer_norm(x, norm.weight, norm.bias, norm.eps, dtype)


def add_scaled(x: Tensor, branch: Tensor, scale: Tensor, factor: Tensor | None) -> Tensor:
    """See gpu_layer_norm.scaled_residual."""
    from ldae.models.gpu_layer_norm import scaled_residual  # needs Triton

    return scaled_residual(x, branch, scale, factor)


class ChannelsLastConvNeXtBlock(Block):
    """ConvNeXt's block with a LayerNorm in 16 bits and a residual as one operation each.

    PyTorch's autocast gives the same values: it converts the norm's result for the Linear that follows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape, float32."""
        if not runs_slice_kernels(x):
            return super().forward(x)
        conv, _, norm, first, gelu, second, _ = self.block
        h = norm_rows(conv(x).permute(0, 2, 3, 1), norm, torch.get_autocast_dtype("cuda"))
        branch = second(gelu(first(h)))  # (N, H, W, C)
        factor = self.draw_depth(x)
        factor = factor if factor is None else factor.flatten()
        return add_scaled(x.permute(0, 2, 3, 1), branch, self.layer_scale.flatten(), factor).permute(0, 3, 1, 2)


class ChannelsLastChannelNorm(ChannelNorm):
    """ChannelNorm of channels-last slices, in float32 as under PyTorch's autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> the same shape."""
        if not runs_slice_kernels(x):
            return super().forward(x)
        return norm_rows(x.permute(0, 2, 3, 1), self, torch.float32).permute(0, 3, 1, 2)


class ChannelsLastUpsample(nn.Upsample):
    """Nearest-neighbour upsampling by whole factors that keeps volumes channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, fx X, fy Y, fz Z)."""
        if not runs_kernels(x):
            return super().forward(x)
        fx, fy, fz = self._factors()
        values = x.permute(0, 2, 3, 4, 1)[:, :, None, :, None, :, None]  # (B, X, 1, Y, 1, Z, 1, C)
        batch, sx, _, sy, _, sz, _, channels = values.shape
        large = values.expand(batch, sx, fx, sy, fy, sz, fz, channels)
        return large.reshape(batch, sx * fx, sy * fy, sz * fz, channels).permute(0, 4, 1, 2, 3)

    def _factors(self) -> tuple[int, int, int]:
        factor = self.scale_factor
        x, y, z = factor if isinstance(factor, tuple) else (factor,) * 3
        return int(x), int(y), int(z)


class ChannelsLastAvgPool3d(nn.AvgPool3d):
    """Average pooling of whole blocks that keeps volumes channels-last."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, X / kx, Y / ky, Z / kz)."""
        if not runs_kernels(x):
            return super().forward(x)
        kx, ky, kz = self.kernel_size
        values = x.permute(0, 2, 3, 4, 1).unflatten(3, (-1, kz)).unflatten(2, (-1, ky)).unflatten(1, (-1, kx))
        return values.mean((2, 4, 6)).permute(0, 4, 1, 2, 3)  # the mean of 16-bit values is summed in float32


GPU_KERNELS: dict[type[nn.Module], type[nn.Module]] = {nn.GroupNorm: GpuGroupNorm}
CHANNELS_LAST_KERNELS: dict[type[nn.Module], type[nn.Module]] = {
    ResidualBlock: ChannelsLastResidualBlock,
    AEKLResBlock: ChannelsLastAutoencoderBlock,
    Block: ChannelsLastConvNeXtBlock,
    ChannelNorm: ChannelsLastChannelNorm,
    nn.GroupNorm: ChannelsLastGroupNorm,
    nn.Upsample: ChannelsLastUpsample,
    nn.AvgPool3d: ChannelsLastAvgPool3d,
}
