"""CPU kernels: other ways to compute parts of the networks, faster on a CPU in float32 and equal up to rounding.

Each is a subclass that takes the place of the class it computes (placement.py). In another precision, under autocast
and at sizes at which it would not be faster, it computes as its parent does. `python -m ldae.bench.cpu_kernels`
measures what each one saves.
"""

import math

import torch
from monai.networks.blocks import UpSample
from torch import Tensor, nn
from torch.nn import functional as F

from ldae.models.semantic_encoder import SemanticEncoder

# PyTorch computes a float32 convolution of one sample with oneDNN only if C * X * Y is larger than this, or if it has
# groups (2.13, aten/src/ATen/native/Convolution.cpp, use_mkldnn). Smaller ones go through im2col, at half the speed.
LARGEST_IM2COL = 20480
# oneDNN reorders the weights at every call, which takes longer than it saves if there are more of them than this.
MOST_WEIGHTS = 2**22
# With fewer voxels, reading the larger kernel of CpuUpSample takes longer than the multiplications that it saves.
FEWEST_VOXELS = 512


def _computes_in_float32(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")


class SmallVolumeConv3d(nn.Conv3d):
    """nn.Conv3d that computes one small volume with oneDNN, as PyTorch does larger ones.

    It convolves two copies of the input as two groups, each of which gives half of the output channels. If their number
    is odd, the last one is computed twice.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.is_slow(x):
            return super()._conv_forward(x, weight, bias)
        if self.out_channels % 2:
            weight, bias = (part if part is None else torch.cat([part, part[-1:]]) for part in (weight, bias))
        y = F.conv3d(torch.cat([x, x], dim=1), weight, bias, self.stride, self.padding, self.dilation, groups=2)
        return y[:, : self.out_channels]

    def is_slow(self, x: Tensor) -> bool:
        """Whether PyTorch would compute this convolution of x (B, C, X, Y, Z) through im2col, slower than oneDNN."""
        return (
            _computes_in_float32(x)
            and len(x) == 1
            and self.groups == 1
            and self.padding_mode == "zeros"
            and self.kernel_size[-1] > 1
            and x.shape[1:4].numel() <= LARGEST_IM2COL
            and x.shape[2:].numel() > 1
            and self.weight.numel() <= MOST_WEIGHTS
        )


class CpuUpSample(UpSample):
    """MONAI's nearest-neighbour upsampling and convolution of the autoencoder, as one transposed convolution.

    Equal voxels are multiplied by the sum of the kernel's planes that meet them. A transposed convolution of the small
    volume with these sums, a kernel of 4 and a stride of 2, takes 8 multiplications instead of 27.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, 2 X, 2 Y, 2 Z)."""
        if not self.is_faster(x):
            return super().forward(x)
        conv = self.postconv.conv  # of size 3, with a padding of 1
        kernel = conv.weight.flip(2, 3, 4).transpose(0, 1)  # (C, C, 3, 3, 3)
        for axis in (2, 3, 4):
            before = [0] * 6
            before[8 - 2 * axis] = 1  # F.pad counts from the last axis on
            after = before[:]
            after[8 - 2 * axis : 10 - 2 * axis] = 0, 1
            kernel = F.pad(kernel, before) + F.pad(kernel, after)
        return F.conv_transpose3d(x, kernel, conv.bias, stride=2, padding=1)

    def is_faster(self, x: Tensor) -> bool:
        """Whether this kernel is faster for x (B, C, X, Y, Z)."""
        return _computes_in_float32(x) and len(x) * x.shape[2:].numel() >= FEWEST_VOXELS


class CpuGroupNorm(nn.GroupNorm):
    """nn.GroupNorm that also trains on channels-last inputs without a gradient, at which PyTorch's kernel crashes.

    Such are the features of the frozen U-Net. PyTorch 2.13 ends with a segmentation fault there, in every precision.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape."""
        if torch.is_grad_enabled() and self.weight.requires_grad and not x.requires_grad:
            x = x.detach().requires_grad_()
        return super().forward(x)


class CpuSemanticEncoder(SemanticEncoder):
    """SemanticEncoder that reads blank slices once and whose attention projects one query instead of all tokens."""

    def read_slices(self, slices: Tensor) -> Tensor:
        """See SemanticEncoder. Without gradients, the blank slices of a batch are read as one: a head leaves a quarter
        of them empty. (A GPU would have to wait for their number.)"""
        if self.training or torch.is_grad_enabled():
            return super().read_slices(slices)
        blank = (slices == 0).flatten(1).all(dim=1)
        read = ~blank | (blank.cumsum(dim=0) == 1)  # all but the blank ones after the first
        place = read.cumsum(dim=0) - 1  # of each slice among those that are read
        place = torch.where(blank, place[blank.int().argmax()], place)
        return super().read_slices(slices[read])[place]

    def attend(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See SemanticEncoder.

        The projections of the keys are applied to the query, q . (W t) = (W^T q) . t, and those of the values to the
        weighted mean of the tokens, so that the cost hardly grows with the number of slices. The biases of the keys add
        the same to the score of every slice and cancel in the softmax.
        """
        attention = self.cross_attention
        heads, size = attention.num_heads, attention.head_dim
        to_query, to_key, to_value = attention.in_proj_weight.chunk(3)
        query_bias, _, value_bias = attention.in_proj_bias.chunk(3)
        query = F.linear(self.query_of(tokens)[:, 0], to_query, query_bias).unflatten(1, (heads, size))
        query = torch.einsum("bhk,hkd->bhd", query / math.sqrt(size), to_key.unflatten(0, (heads, size)))
        # This bias changes nothing, but training in several processes waits for its gradient, which is 0.
        scores = (query @ self.key.weight) @ tokens.mT + (query @ self.key.bias)[..., None]  # (B, heads, S)
        weights = scores.softmax(dim=2)
        used = F.dropout(weights, attention.dropout, self.training)
        total = used.sum(dim=2, keepdim=True)  # 1 but for dropout: how often a bias of the values counts
        values = F.linear(used @ tokens, self.value.weight) + total * self.value.bias  # (B, heads, dim)
        values = torch.einsum("bhd,hkd->bhk", values, to_value.unflatten(0, (heads, size)))
        values = values + total * value_bias.unflatten(0, (heads, size))
        return attention.out_proj(values.flatten(1)), weights


CPU_KERNELS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv3d: SmallVolumeConv3d,
    UpSample: CpuUpSample,
    nn.GroupNorm: CpuGroupNorm,
    SemanticEncoder: CpuSemanticEncoder,
}
