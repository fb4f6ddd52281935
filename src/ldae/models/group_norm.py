"""Group normalisation of few, large groups on a GPU, as volumes have them.

PyTorch's kernels (2.11, 2.13) give each group to one thread block: with one volume of 128x160x128 and 32 groups, 100 of
an H200's 132 multiprocessors have nothing to do, and norms take half of the autoencoder's training step. The same
sums here are split over the whole GPU, by PyTorch's own reductions and the kernels of its synchronised batch norm.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MANY_GROUPS = 512  # in a batch: enough for PyTorch's own kernels
LARGE = 2**20  # numbers in a group from which its own kernels are slow (measured: docs/bench.md)
MANY_PARTS = 1024  # that a backward reduction is split into, at least
SMALLEST_WEIGHT = 1e-12


def has_few_large_groups(x: Tensor, groups: int) -> bool:
    """Whether `split_group_norm` is the faster one for x (B, C, ...): on CUDA in 16 bits, and not inside compiled code,
    which splits reductions by itself."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16) or torch.compiler.is_compiling():
        return False
    return len(x) * groups < MANY_GROUPS and x[0].numel() // groups >= LARGE


def split_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.group_norm of x (B, C, ...) on CUDA; sums in float32, the result in the dtype of x.

    The variance is the mean square less the squared mean: right to 0.3 % where the mean is 100 standard deviations,
    which 16 bits cannot tell apart any more.

    Args:
        weight, bias: (C,) float32.
    """
    return _SplitGroupNorm.apply(x, groups, weight, bias, eps)


class _SplitGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        batch, channels = x.shape[:2]
        rows = x.view(batch * groups, -1)
        mean = rows.sum(1, dtype=torch.float32) / rows.shape[1]
        square = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).square() / rows.shape[1]
        rstd = (square - mean.square()).clamp(min=0).add(eps).rsqrt()
        # From here on each channel of each sample is a channel of its own, which the batch norm's kernels take.
        mean, rstd = (value.repeat_interleave(channels // groups) for value in (mean, rstd))
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        flat = x.view(1, batch * channels, -1)
        return torch.batch_norm_elemt(flat, weight.repeat(batch), bias.repeat(batch), mean, rstd, eps).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor, Tensor, None]:
        """With x^ = (x - mean) rstd and sums over a group of n numbers:

        dx = rstd (w dy - sum(w dy) / n - x^ sum(w dy x^) / n),  dw = sum(dy x^),  db = sum(dy).
        """
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels = x.shape[:2]
        size, n = x[0, 0].numel(), x[0].numel() // ctx.groups
        flat, dy = x.view(1, batch * channels, size), dy.contiguous().view(1, batch * channels, size)
        parts = _parts(batch * channels, size)
        sums = torch.batch_norm_backward_reduce(
            dy.view(1, -1, size // parts), flat.view(1, -1, size // parts),
            mean.repeat_interleave(parts), rstd.repeat_interleave(parts), None, True, False, False,
        )[:2]  # fmt: skip
        of_dy, of_product = (value.view(batch, channels, parts).sum(2) for value in sums)  # dy, and dy (x - mean)
        in_group = [_over_groups(weight * value, ctx.groups) / n for value in (of_dy, of_product)]
        # The kernel multiplies all of its terms by the channel's weight, which those two already hold.
        divisor = torch.where(weight.abs() < SMALLEST_WEIGHT, SMALLEST_WEIGHT, weight)
        terms = [(value / divisor).flatten() for value in in_group]
        one = torch.ones(1, dtype=torch.int32, device=x.device)
        dx = torch.batch_norm_backward_elemt(dy, flat, mean, rstd, divisor.repeat(batch), *terms, one)
        return dx.view(x.shape), None, (of_product * rstd.view(batch, channels)).sum(0), of_dy.sum(0), None


def _over_groups(value: Tensor, groups: int) -> Tensor:
    """(B, C) to the sum over each channel's group, (B, C)."""
    each = value.shape[1] // groups
    return value.unflatten(1, (groups, each)).sum(2).repeat_interleave(each, dim=1)


def _parts(channels: int, size: int) -> int:
    """Equal parts that each channel's numbers are divided into: a power of two."""
    parts = 1
    while channels * parts < MANY_PARTS and size % (2 * parts) == 0:
        parts *= 2
    return parts
