"""LayerNorm over channels, and the scaled residual of ConvNeXt, of channels-last slices, by Triton kernels.

PyTorch's LayerNorm gives each row of channels to a whole thread block, which is slow for the 96 channels at ConvNeXt's
finest level; under autocast it also converts its input to float32 and its output back. Here a program takes several
rows, computes in float32 as well, and reads and writes each value once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

VALUES = 4096  # that a program holds
PROGRAMS = 1056  # that a backward pass is divided among, at most: eight for each multiprocessor of an H100


@triton.jit
def _norm_kernel(x, y, weight, bias, mean, rstd, rows, channels, eps, BR: tl.constexpr, BC: tl.constexpr):
    """y = (x - mean) rstd weight + bias for BR rows."""
    r, c = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BC)
    inside, channel = r < rows, c < channels
    mask = inside[:, None] & channel[None, :]
    place = r[:, None] * channels + c[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    m = tl.sum(value, 1) / channels
    centred = tl.where(mask, value - m[:, None], 0.0)
    s = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / channels + eps)
    w, b = tl.load(weight + c, mask=channel, other=0.0), tl.load(bias + c, mask=channel, other=0.0)
    result = centred * s[:, None] * w[None, :] + b[None, :]
    tl.store(y + place, result.to(y.dtype.element_ty), mask=mask)
    tl.store(mean + r, m, mask=inside)
    tl.store(rstd + r, s, mask=inside)


@triton.jit
def _norm_backward_kernel(
    x, dy, weight, mean, rstd, dx, sums, rows, channels, part_rows, BR: tl.constexpr, BC: tl.constexpr
):
    """dx = rstd (w dy - mean(w dy) - x^ mean(w dy x^)), and sums of dy x^ and of dy over a part of the rows."""
    part, c = tl.program_id(0), tl.arange(0, BC)
    channel = c < channels
    w = tl.load(weight + c, mask=channel, other=0.0)
    of_weight, of_bias = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for start in range(part * part_rows, tl.minimum((part + 1) * part_rows, rows), BR):
        r = start + tl.arange(0, BR)
        inside = r < tl.minimum((part + 1) * part_rows, rows)
        mask = inside[:, None] & channel[None, :]
        place = r[:, None].to(tl.int64) * channels + c[None, :]
        m, s = tl.load(mean + r, mask=inside, other=0.0), tl.load(rstd + r, mask=inside, other=0.0)
        g = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        normed = tl.where(mask, (value - m[:, None]) * s[:, None], 0.0)
        of_weight += tl.sum(g * normed, 0)
        of_bias += tl.sum(g, 0)
        g = g * w[None, :]
        first, second = tl.sum(g, 1) / channels, tl.sum(g * normed, 1) / channels
        result = (g - first[:, None] - normed * second[:, None]) * s[:, None]
        tl.store(dx + place, result.to(dx.dtype.element_ty), mask=mask)
    out = sums + part * 2 * channels + c
    tl.store(out, of_weight, mask=channel)
    tl.store(out + channels, of_bias, mask=channel)


@triton.jit
def _residual_kernel(
    x, branch, scale, factor, y, rows, channels, pixels, FACTOR: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """y = x + factor scale branch, with a scale of each channel and a factor of each sample."""
    r, c = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BC)
    inside, channel = r < rows, c < channels
    mask = inside[:, None] & channel[None, :]
    place = r[:, None] * channels + c[None, :]
    s = tl.load(scale + c, mask=channel, other=0.0)[None, :]
    if FACTOR:
        s = s * tl.load(factor + r // pixels, mask=inside, other=0.0)[:, None]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    value += s * tl.load(branch + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _residual_backward_kernel(
    dy, branch, scale, factor, dbranch, sums, rows, channels, pixels, part_rows,
    FACTOR: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradient of the branch, factor scale dy, and sums of factor dy branch over a part of the rows."""
    part, c = tl.program_id(0), tl.arange(0, BC)
    channel = c < channels
    s = tl.load(scale + c, mask=channel, other=0.0)
    total = tl.zeros((BC,), tl.float32)
    for start in range(part * part_rows, tl.minimum((part + 1) * part_rows, rows), BR):
        r = start + tl.arange(0, BR)
        inside = r < tl.minimum((part + 1) * part_rows, rows)
        mask = inside[:, None] & channel[None, :]
        place = r[:, None].to(tl.int64) * channels + c[None, :]
        g = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32)
        if FACTOR:
            g = g * tl.load(factor + r // pixels, mask=inside, other=0.0)[:, None]
        total += tl.sum(g * tl.load(branch + place, mask=mask, other=0.0).to(tl.float32), 0)
        tl.store(dbranch + place, (g * s[None, :]).to(dbranch.dtype.element_ty), mask=mask)
    tl.store(sums + part * channels + c, total, mask=channel)


class _Rows:
    """How rows of channels are divided among programs."""

    def __init__(self, x: Tensor) -> None:
        self.channels = x.shape[-1]
        self.rows = x.numel() // self.channels
        self.block = triton.next_power_of_2(self.channels)
        self.each = max(1, VALUES // self.block)
        self.grid = (triton.cdiv(self.rows, self.each),)
        parts = min(PROGRAMS, self.grid[0])
        self.part_rows = triton.cdiv(triton.cdiv(self.rows, parts), self.each) * self.each
        self.parts = triton.cdiv(self.rows, self.part_rows)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        rows = _Rows(x)
        y = torch.empty_like(x, dtype=dtype)
        mean, rstd = torch.empty(2, rows.rows, dtype=torch.float32, device=x.device)
        _norm_kernel[rows.grid](
            x, y, weight, bias, mean, rstd, rows.rows, rows.channels, eps, BR=rows.each, BC=rows.block
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight, mean, rstd = ctx.saved_tensors
        rows, dx = _Rows(x), torch.empty_like(x)
        sums = torch.empty(rows.parts, 2, rows.channels, dtype=torch.float32, device=x.device)
        _norm_backward_kernel[(rows.parts,)](
            x, dy.contiguous(), weight, mean, rstd, dx, sums, rows.rows, rows.channels, rows.part_rows,
            BR=rows.each, BC=rows.block,
        )  # fmt: skip
        of_weight, of_bias = sums.sum(0)
        return dx, of_weight, of_bias, None, None


class _ScaledResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, branch: Tensor, scale: Tensor, factor: Tensor | None) -> Tensor:
        rows, y = _Rows(x), torch.empty_like(x, dtype=torch.float32)
        ctx.dtype = x.dtype
        ctx.pixels = rows.rows // len(x)
        _residual_kernel[rows.grid](
            x, branch, scale, scale if factor is None else factor, y, rows.rows, rows.channels, ctx.pixels,
            FACTOR=factor is not None, BR=rows.each, BC=rows.block,
        )  # fmt: skip
        ctx.save_for_backward(branch, scale, factor)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, branch and scale."""
        branch, scale, factor = ctx.saved_tensors
        dy, rows, dbranch = dy.contiguous(), _Rows(branch), torch.empty_like(branch)
        sums = torch.empty(rows.parts, rows.channels, dtype=torch.float32, device=dy.device)
        _residual_backward_kernel[(rows.parts,)](
            dy, branch, scale, scale if factor is None else factor, dbranch, sums,
            rows.rows, rows.channels, ctx.pixels, rows.part_rows,
            FACTOR=factor is not None, BR=rows.each, BC=rows.block,
        )  # fmt: skip
        return dy.to(ctx.dtype), dbranch, sums.sum(0), None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """LayerNorm over the last axis of x (..., C), computed in float32, as a tensor of `dtype`.

    Args:
        weight, bias: (C,) float32.
    """
    return _LayerNorm.apply(x.contiguous(), weight, bias, eps, dtype)


def scaled_residual(x: Tensor, branch: Tensor, scale: Tensor, factor: Tensor | None = None) -> Tensor:
    """x + factor scale branch, float32.

    Args:
        x, branch: (N, ..., C), of any floating dtypes.
        scale: (C,) float32.
        factor: (N,) float32, or None for 1.
    """
    return _ScaledResidual.apply(x.contiguous(), branch.contiguous(), scale, factor)
