"""The GPU kernels (models/gpu_kernels.py) compared with PyTorch's: values, gradients and time, in bfloat16."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldae.bench.gpu_check.check import GpuCheck, Numbers
from ldae.bench.measure import synchronise, time_calls
from ldae.models.gpu_kernels import ChannelsLastAvgPool3d, ChannelsLastUpsample, has_triton, norm_silu

GROUPS = 32
SHAPES = ((1, 64, 128, 160, 128), (1, 128, 64, 80, 64), (64, 192, 16, 20, 16), (4, 384, 8, 10, 8))
SLICES = (512, 32, 40, 96)  # of four scans at ConvNeXt's finest level
Work = Callable[..., Tensor]


def compare_kernels(check: GpuCheck) -> Numbers:
    """By kernel and shape: relative errors of values and gradients, and milliseconds of forward and backward pass.

    The errors are those from the same computation in float32; PyTorch's own, in 16 bits, are given beside them. On a
    CPU there is nothing to compare.
    """
    if not torch.cuda.is_available() or not has_triton():
        return {"compared": 0.0}
    from ldae.models.gpu_layer_norm import layer_norm, scaled_residual

    numbers = {f"norm {shape[1]}x{shape[2]}": _compare_norm(shape) for shape in SHAPES}
    numbers["upsample"] = _compare(
        ChannelsLastUpsample(scale_factor=2.0),
        nn.Upsample(scale_factor=2.0, mode="nearest"),
        [(4, 384, 8, 10, 8)],
        (1,),
    )
    numbers["average pool"] = _compare(
        ChannelsLastAvgPool3d((2, 2, 2)), nn.AvgPool3d((2, 2, 2)), [(4, 192, 16, 20, 16)], (1,)
    )
    numbers["layer norm"] = _compare(
        lambda x, weight, bias: layer_norm(x, weight, bias, 1e-6, x.dtype),
        lambda x, weight, bias: F.layer_norm(x.float(), x.shape[-1:], weight, bias, 1e-6).to(x.dtype),
        [SLICES, SLICES[-1:], SLICES[-1:]], (1,),
    )  # fmt: skip
    numbers["scaled residual"] = _compare(
        lambda x, branch, scale: scaled_residual(x.float(), branch, scale),
        lambda x, branch, scale: x.float() + scale * branch,
        [SLICES, SLICES, SLICES[-1:]], (),
    )  # fmt: skip
    return numbers


def _compare_norm(shape: tuple[int, ...]) -> Numbers:
    batch, channels = shape[:2]

    def ours(x: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
        return norm_silu(x, _norm(weight, bias), factor, shift)

    def plain(x: Tensor, weight: Tensor, bias: Tensor, factor: Tensor, shift: Tensor) -> Tensor:
        h = F.group_norm(x, GROUPS, weight.to(x.dtype), bias.to(x.dtype))
        wide = (..., None, None, None)
        return F.silu(torch.addcmul(shift.to(x.dtype)[wide], h, factor.to(x.dtype)[wide]))

    return _compare(ours, plain, [shape, (channels,), (channels,), (batch, channels), (batch, channels)], (1, 3))


def _norm(weight: Tensor, bias: Tensor) -> nn.GroupNorm:
    norm = nn.GroupNorm(GROUPS, len(weight), device="meta")
    del norm.weight, norm.bias
    norm.weight, norm.bias = weight, bias
    return norm


def _compare(ours: Work, plain: Work, shapes: Sequence[tuple[int, ...]], around_1: Sequence[int]) -> Numbers:
    """Compare two functions of a volume, in bfloat16, and of further float32 tensors of these shapes.

    Args:
        around_1: numbers of the tensors that are near 1, as weights and factors are.
    """
    torch.manual_seed(0)
    values = [
        torch.randn(shape, device="cuda") * (0.1 if n in around_1 else 1) + (n in around_1)
        for n, shape in enumerate(shapes)
    ]
    x = (2 * values[0] + 0.5).bfloat16()
    last = x.contiguous(memory_format=torch.channels_last_3d) if x.ndim == 5 else x
    dy = torch.randn_like(plain(x.float(), *values[1:]))
    exact = _results(plain, [x.float(), *values[1:]], dy)
    numbers: Numbers = {}
    for label, function, volume in (("ours", ours, last), ("plain", plain, x)):
        own = dy.bfloat16()
        if function is ours and own.ndim == 5:
            own = own.contiguous(memory_format=torch.channels_last_3d)
        leaves = [volume, *values[1:]]
        pairs = zip(_results(function, leaves, own), exact, strict=True)
        numbers[f"{label}_worst_error"] = max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
        synchronise(x.device)
        cost = time_calls(lambda f=function, v=leaves, g=own: _results(f, v, g), 5, x.device)
        numbers[f"{label}_ms"] = 1e3 * cost.seconds
    return numbers


def _results(function: Work, values: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """The function's value and its gradients."""
    leaves = [value.detach().requires_grad_() for value in values]
    y = function(*leaves)
    y.backward(dy.to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]
