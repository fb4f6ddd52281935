"""Group normalisation on GPUs: the output keeps the dtype of the input, and few large groups use the whole GPU.

PyTorch's kernels (2.11, 2.13) give each group to one thread block. With one volume of 128x160x128 voxels and 32 groups,
100 of an H200's 132 multiprocessors are idle, and the norms take half of the autoencoder's training step. The sums are
split over the whole GPU here, by PyTorch's own reductions and by the kernels of its synchronised batch norm.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

MANY_GROUPS = 512  # in a batch: from here on, PyTorch's own kernels occupy the whole GPU
LARGE = 2**20  # values in a group from which PyTorch's own kernels are slower (measured: docs/bench.md)
MANY_PARTS = 1024  # number of parts that a reduction of the backward pass is split into, at least
SMALLEST_WEIGHT = 1e-12


class GpuGroupNorm(nn.GroupNorm):
    """nn.GroupNorm for GPUs, with the same parameters, whose output has the dtype of its input.

    Under autocast on a GPU, nn.GroupNorm returns float32, so that everything up to the next convolution moves twice as
    many bytes. The sums are in float32 in both.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same shape and dtype."""
        with torch.autocast(x.device.type, enabled=False):
            if has_few_large_groups(x, self.num_groups):
                return split_group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


GPU_KERNELS = {nn.GroupNorm: GpuGroupNorm}  # see placement.py


def has_few_large_groups(x: Tensor, groups: int) -> bool:
    """Whether `split_group_norm` is the faster one for x (B, C, ...).

    It is on CUDA, in 16 bits, for few large groups, but not in compiled code, which splits reductions itself.
    """
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16) or torch.compiler.is_compiling():
        return False
    return len(x) * groups < MANY_GROUPS and x[0].numel() // groups >= LARGE


def split_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.group_norm of x (B, C, ...) on CUDA. The sums are in float32, and the result has the dtype of x.

    The variance is the mean of squares minus the square of the mean. It is exact to 0.3 % if the mean is 100 standard
    deviations, a ratio at which 16-bit values no longer resolve the standard deviation.

    Args:
        weight, bias: (C,) float32.
    """
    return _SplitGroupNorm.apply(x, groups, weight, bias, eps)


class _SplitGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        batch, channels = x.shape[:2]
        rows = x.view(batch * groups, -1)
        mean = rows.sum(1, dtype=torch.float32) / rows.shape[1]
        square = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).square() / rows.shape[1]
        rstd = (square - mean.square()).clamp(min=0).add(eps).rsqrt()
        # The batch norm's kernels normalise channels: each channel of each sample is a channel of its own for them.
        mean, rstd = (value.repeat_interleave(channels // groups) for value in (mean, rstd))
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        flat = x.view(1, batch * channels, -1)
        return torch.batch_norm_elemt(flat, weight.repeat(batch), bias.repeat(batch), mean, rstd, eps).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        """With x^ = (x - mean) rstd and sums over a group of n values:

        dx = rstd (w dy - sum(w dy) / n - x^ sum(w dy x^) / n),  dw = sum(dy x^),  db = sum(dy).
        """
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels = x.shape[:2]
        size, n = x[0, 0].numel(), x[0].numel() // ctx.groups
        flat, dy = x.view(1, batch * channels, size), dy.contiguous().view(1, batch * channels, size)
        parts = _count_parts(batch * channels, size)
        sums = torch.batch_norm_backward_reduce(
            dy.view(1, -1, size // parts), flat.view(1, -1, size // parts),
            mean.repeat_interleave(parts), rstd.repeat_interleave(parts), None, True, False, False,
        )[:2]  # fmt: skip
        # Sums over each channel of each sample, (B, C): of dy, and of dy (x - mean).
        sum_dy, sum_product = (value.view(batch, channels, parts).sum(2) for value in sums)
        group_means = [_sum_over_groups(weight * value, ctx.groups) / n for value in (sum_dy, sum_product)]
        # The kernel multiplies all of its terms by the channel's weight, which `group_means` already contain.
        divisor = torch.where(weight.abs() < SMALLEST_WEIGHT, SMALLEST_WEIGHT, weight)
        terms = [(value / divisor).flatten() for value in group_means]
        one = torch.ones(1, dtype=torch.int32, device=x.device)
        dx = torch.batch_norm_backward_elemt(dy, flat, mean, rstd, divisor.repeat(batch), *terms, one)
        return dx.view(x.shape), None, (sum_product * rstd.view(batch, channels)).sum(0), sum_dy.sum(0), None


def _sum_over_groups(value: Tensor, groups: int) -> Tensor:
    """For each channel the sum over the channels of its group: (B, C) -> (B, C)."""
    each = value.shape[1] // groups
    return value.unflatten(1, (groups, each)).sum(2).repeat_interleave(each, dim=1)


def _count_parts(channels: int, size: int) -> int:
    """Number of equal parts, a power of two, that each channel's `size` values are divided into."""
    parts = 1
    while channels * parts < MANY_PARTS and size % (2 * parts) == 0:
        parts *= 2
    return parts
