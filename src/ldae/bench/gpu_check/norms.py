"""The split group norm (models/group_norm.py) compared with PyTorch's: values, gradients and time."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ldae.bench.gpu_check.check import GpuCheck, Numbers
from ldae.bench.measure import synchronise, time_calls
from ldae.models.group_norm import split_group_norm

GROUPS, EPS = 32, 1e-5
CASES = (("float32", (1, 64, 64, 80, 64)), ("bfloat16", (1, 64, 128, 160, 128)), ("bfloat16", (1, 128, 64, 80, 64)))
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's group norm."""
    return F.group_norm(x, GROUPS, weight.to(x.dtype), bias.to(x.dtype), EPS)


def split_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The split group norm."""
    return split_group_norm(x, GROUPS, weight, bias, EPS)


def _results(norm: Norm, x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [value.detach().requires_grad_() for value in (x, weight, bias)]
    y = norm(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def compare_norms(check: GpuCheck) -> Numbers:
    """By case: relative differences of values and gradients from PyTorch's norm in float32, and milliseconds.

    Times are of forward and backward pass. On a CPU there is nothing to compare, because the split norm is for GPUs.
    """
    if not torch.cuda.is_available():
        return {"compared": 0.0}
    device = torch.device("cuda")
    return {f"{name} {shape[1]}x{shape[2]}": _case(name, shape, device) for name, shape in CASES}


def _case(name: str, shape: tuple[int, ...], device: torch.device) -> Numbers:
    torch.manual_seed(0)
    x = (2 * torch.randn(shape, device=device) + 0.5).to(getattr(torch, name))
    dy = torch.randn(shape, device=device)
    weight, bias = (1 + 0.1 * torch.randn(shape[1], device=device), torch.randn(shape[1], device=device))
    exact = _results(plain_norm, x.float(), weight, bias, dy)
    numbers: Numbers = {}
    for label, norm in (("plain", plain_norm), ("split", split_norm)):
        found = _results(norm, x, weight, bias, dy)
        errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
        numbers |= {f"{label}_{part}_error": e for part, e in zip(("y", "dx", "dw", "db"), errors, strict=True)}
        synchronise(device)
        numbers[f"{label}_ms"] = 1e3 * time_calls(lambda n=norm: _results(n, x, weight, bias, dy), 5, device).seconds
    return numbers
