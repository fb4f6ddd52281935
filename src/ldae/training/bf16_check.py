"""Check of bf16 convolutions on CPUs before they are used in training; those that are wrong are computed in float32.

PyTorch 2.13.0 (oneDNN 3.12) returns wrong weight gradients for some bf16 convolutions on CPUs with AVX512-BF16
(docs/history/bf16-conv3d-on-cpus.md). They are not always infinite, so training would continue with a wrong gradient.
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

TOLERANCE = 0.05  # relative; correct kernels differ from float32 by the rounding of their results, 0.2 to 0.5 %
QUANTITIES = ("output", "input gradient", "weight gradient", "bias gradient")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

# (x, weight, bias) -> y, computed in the dtype of the active autocast.
Convolution = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class ConvolutionSignature(NamedTuple):
    """Everything that determines which kernel computes a convolution."""

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
        """Whether this is a convolution known to be wrong, for which no check with random numbers is relied on."""
        one, three = (1, 1, 1), (3, 3, 3)
        return self.weight[2:] == three and self.padding in (one, "same") and self.input[2] == 2


_is_correct: dict[ConvolutionSignature, bool] = {}  # results of the checks in this process


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest norm of the error in any slice along any axis, relative to the root mean square norm of expected slices.

    Because the worst slice counts, a single wrong channel, plane or kernel tap is detected. Infinite if `found` is not
    finite.
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
    """Relative errors of the output and gradients of a bf16 convolution against float32, by QUANTITIES.

    Args:
        convolve: the convolution.
        x, weight, bias: (B, C, ...), (C', C / groups, ...) and (C',), float32 on the CPU.
    """
    # The inputs are rounded to bf16 first, so that only the errors of the kernels remain.
    inputs = [t.bfloat16().to(torch.float32).requires_grad_() for t in (x, weight, bias) if t is not None]
    x, weight, bias = (*inputs, None)[:3]
    results, output_gradient = [], None
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = convolve(x, weight, bias)
        if output_gradient is None:
            # Its mean is not 0, so that the gradient of the bias, which is its sum, does not cancel.
            output_gradient = torch.empty_like(y).normal_(0.5, generator=torch.Generator().manual_seed(1)).bfloat16()
        results.append([y.detach(), *torch.autograd.grad(y, inputs, output_gradient.to(y.dtype))])
    expected, reduced = results
    return {
        name: relative_error(value.float(), reference)
        for name, value, reference in zip(QUANTITIES[: len(expected)], reduced, expected, strict=True)
    }


def _check(convolve: Convolution, signature: ConvolutionSignature) -> bool:
    """Whether bf16 agrees with float32 on random numbers; a warning is logged if it does not."""
    # With its own generator, so that the check does not change the random numbers of the training.
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
        log.warning(
            "bf16 is wrong on this CPU (relative error: %s); computed in float32 instead: %s", errors, signature
        )
    return not wrong


def _computes_correctly(module: "_Guarded", shape: tuple[int, ...], channels_last: bool) -> bool:
    """Whether bf16 is correct for this convolution of inputs (B, C, ...); checked at the first call with this shape."""
    signature = ConvolutionSignature(
        module.convolution, tuple(shape), tuple(module.weight.shape), module.bias is not None, module.stride,
        module.padding, module.dilation, module.groups, module.padding_mode, channels_last,
    )  # fmt: skip
    if signature not in _is_correct:
        if signature.known_wrong:
            _is_correct[signature] = False
        else:
            # In a new thread no autocast, checkpointing hooks, tracing or operation counters are active.
            with ThreadPoolExecutor(1) as thread:
                _is_correct[signature] = thread.submit(_check, module.unguarded, signature).result()
    return _is_correct[signature]


class _Guarded:
    """Mixin in front of a convolution's class that decides in every call whether to compute in bf16 or in float32."""

    convolution: ClassVar[type[nn.Module]]

    def unguarded(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution of the original class."""
        return super()._conv_forward(x, weight, bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        reduced = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
        if x.device.type != "cpu" or not reduced or not torch.is_grad_enabled():
            return self.unguarded(x, weight, bias)
        layout = CHANNELS_LAST.get(x.dim())
        channels_last = layout is not None and x.is_contiguous(memory_format=layout) and not x.is_contiguous()
        if _computes_correctly(self, x.shape, channels_last):
            return self.unguarded(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            y = self.unguarded(x.float(), weight.float(), None if bias is None else bias.float())
        return y.to(torch.bfloat16)


@cache
def _guarded(convolution: type[nn.Module]) -> type[nn.Module]:
    return type(f"Guarded{convolution.__name__}", (_Guarded, convolution), {"convolution": convolution})


def guard_bf16(module: nn.Module) -> nn.Module:
    """Make the convolutions of `module` train in float32 on a CPU wherever this CPU computes them wrongly in bf16.

    Before the first training call under CPU bf16 autocast with a new shape, output and gradients for that shape are
    compared with float32. If they are wrong, this is logged, and the shape is computed in float32 from then on in the
    whole process. Parameters, their names and all other results are unchanged. A second call has no effect.

    Returns:
        The same module.

    Raises:
        UserError: it contains transposed convolutions, for which there is no check.
    """
    # torch.compile calls this while tracing and keeps the answer. Marked only here, because the import takes seconds.
    torch.compiler.assume_constant_result(_computes_correctly)
    for name, child in module.named_modules():
        if isinstance(child, _ConvTransposeNd):
            raise UserError(f"{name}: transposed convolutions are not checked in bf16 on a CPU: use accelerator=cpu")
        if isinstance(child, _ConvNd) and not isinstance(child, _Guarded):
            child.__class__ = _guarded(type(child))
    return module
