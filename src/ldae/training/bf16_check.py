"""bf16 convolutions on CPUs are proved before they train anything, and computed in float32 where they are wrong.

PyTorch 2.13.0 (oneDNN 3.12) returns garbage for the weight gradient of some bf16 convolutions on CPUs with AVX512-BF16
(docs/history/bf16-conv3d-on-cpus.md). It is not always infinite: training would go on with a wrong gradient.
"""

import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

# Right kernels differ from float32 by the rounding of their results, 0.2 to 0.5 %.
TOLERANCE = 0.05
QUANTITIES = ("output", "input gradient", "weight gradient", "bias gradient")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# (x, weight, bias) -> y; it computes in the dtype that autocast asks for.
Convolution = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Signature(NamedTuple):
    """What decides which kernel computes a convolution."""

    module: type[nn.Module]
    input: tuple[int, ...]  # (B, C, ...)
    weight: tuple[int, ...]  # (C', C / groups, ...)
    bias: bool
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    channels_last: bool

    def __str__(self) -> str:
        name, (outputs, _, *kernel) = self.module.__name__, self.weight
        sizes = f"kernel {tuple(kernel)}, stride {self.stride}, padding {self.padding}, groups {self.groups}"
        return f"{name} of {self.input[1]} -> {outputs} channels, {sizes}, input {self.input}"

    @property
    def known_wrong(self) -> bool:
        """Whether this is the fault that was found, which is not left to a proof with random numbers."""
        one, three = (1, 1, 1), (3, 3, 3)
        return self.weight[2:] == three and self.padding in (one, "same") and self.input[2] == 2


_right: dict[Signature, bool] = {}  # what this process has found out


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest norm of the difference in any slice across any axis, by the root mean square of expected slices' norms.

    One wrong channel, plane or kernel tap counts as much as a wrong tensor. Infinite if `found` is not finite.
    """
    if not found.isfinite().all():
        return math.inf
    worst = 0.0
    difference, expected = (found - expected).square(), expected.square()
    for axis, size in enumerate(expected.shape):
        wrong, whole = (t.movedim(axis, 0).reshape(size, -1).sum(1) for t in (difference, expected))
        worst = max(worst, float((wrong.max() / whole.mean()).sqrt()))
    return worst


def bf16_errors(convolve: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, float]:
    """Relative errors of a bf16 convolution's output and gradients against the same in float32, by their names.

    Args:
        convolve: what is on trial.
        x, weight, bias: (B, C, ...), (C', C / groups, ...), (C',), float32 on the CPU.
    """
    # Rounded first: what differs then is the kernels' own.
    inputs = [t.bfloat16().to(torch.float32).requires_grad_() for t in (x, weight, bias) if t is not None]
    x, weight, bias = (*inputs, None)[:3]
    found, above = [], None
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = convolve(x, weight, bias)
        if above is None:
            # Its mean is not 0: a bias's gradient, the sum of it, must not cancel.
            above = torch.empty_like(y).normal_(0.5, generator=torch.Generator().manual_seed(1)).bfloat16()
        found.append([y.detach(), *torch.autograd.grad(y, inputs, above.to(y.dtype))])
    expected, reduced = found
    return {
        name: relative_error(mine.float(), right)
        for name, mine, right in zip(QUANTITIES[: len(expected)], reduced, expected, strict=True)
    }


def _prove(convolve: Convolution, signature: Signature) -> bool:
    # A generator of its own: training draws the same numbers with the proof and without it.
    generator = torch.Generator().manual_seed(0)
    layout = CHANNELS_LAST[len(signature.input)] if signature.channels_last else torch.contiguous_format
    x, weight = (
        torch.randn(shape, generator=generator).to(memory_format=layout)
        for shape in (signature.input, signature.weight)
    )
    bias = torch.randn(signature.weight[0], generator=generator) if signature.bias else None
    wrong = {name: error for name, error in bf16_errors(convolve, x, weight, bias).items() if not error <= TOLERANCE}
    if wrong:
        errors = ", ".join(f"{name} {error:.2g}" for name, error in wrong.items())
        log.warning("bf16 is wrong on this CPU (relative error: %s), so float32 computes %s", errors, signature)
    return not wrong


def _computes_right(module: "_Guarded", shape: tuple[int, ...], channels_last: bool) -> bool:
    """Whether bf16 may compute this convolution of inputs (B, C, ...); proved at the first question."""
    signature = Signature(
        module.convolution, tuple(shape), tuple(module.weight.shape), module.bias is not None, module.stride,
        module.padding, module.dilation, module.groups, module.padding_mode, channels_last,
    )  # fmt: skip
    if signature not in _right:
        if signature.known_wrong:
            _right[signature] = False
        else:
            # A thread of its own has no autocast, no hooks of checkpointing and nothing that traces or counts.
            with ThreadPoolExecutor(1) as thread:
                _right[signature] = thread.submit(_prove, module.unguarded, signature).result()
    return _right[signature]


class _Guarded:
    """Stands before the class of a convolution and decides, call by call, in which precision it computes."""

    convolution: ClassVar[type[nn.Module]]

    def unguarded(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution as its class has it."""
        return super()._conv_forward(x, weight, bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        reduced = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
        if x.device.type != "cpu" or not reduced or not torch.is_grad_enabled():
            return self.unguarded(x, weight, bias)
        layout = CHANNELS_LAST.get(x.dim())
        channels_last = layout is not None and x.is_contiguous(memory_format=layout) and not x.is_contiguous()
        if _computes_right(self, x.shape, channels_last):
            return self.unguarded(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            y = self.unguarded(x.float(), weight.float(), None if bias is None else bias.float())
        return y.to(torch.bfloat16)


@cache
def _guarded(convolution: type[nn.Module]) -> type[nn.Module]:
    return type(f"Guarded{convolution.__name__}", (_Guarded, convolution), {"convolution": convolution})


def guard_bf16(module: nn.Module) -> nn.Module:
    """`module`, whose convolutions no longer train in bf16 on a CPU where this CPU does that wrongly.

    At the first training call under CPU bf16 autocast with a new shape, which is before the first backward pass, output
    and gradients of that shape are compared with float32. A shape that is wrong is logged and computed in float32 from
    then on, in the whole process. Parameters, names and results elsewhere stay; a second call changes nothing.

    Raises:
        UserError: it has transposed convolutions, for which there is no proof.
    """
    # torch.compile asks while it traces and keeps the answer. Marked here, since the mark takes seconds to import.
    torch.compiler.assume_constant_result(_computes_right)
    for name, child in module.named_modules():
        if isinstance(child, _ConvTransposeNd):
            raise UserError(f"{name}: transposed convolutions are not proved in bf16 on a CPU: use accelerator=cpu")
        if isinstance(child, _ConvNd) and not isinstance(child, _Guarded):
            child.__class__ = _guarded(type(child))
    return module
