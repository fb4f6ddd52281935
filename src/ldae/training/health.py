"""What goes wrong in a step: losses and gradients that are no numbers, losses far above the others."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldae.errors import UserError

Batch = dict[str, Any]


class NonFiniteStep(Exception):
    """The loss or the gradient of a step is NaN or infinite, in any process; no weight has moved.

    Attributes:
        micro_batches: those of this process that had such a loss; all of them where no loss but the gradient is bad.
    """

    def __init__(self, micro_batches: Sequence[Batch]) -> None:
        super().__init__("non-finite loss or gradient")
        self.micro_batches = micro_batches


def suspects(micro_batches: Sequence[Batch]) -> list[int]:
    """Training samples that may be at fault: those that hold NaN themselves, or else all."""
    found: list[int] = []
    for batch in micro_batches:
        index = np.asarray(batch["index"])
        bad = np.zeros(len(index), dtype=bool)
        for value in batch.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                bad |= ~torch.isfinite(value).flatten(1).all(1).cpu().numpy()
        found += index[bad if bad.any() else slice(None)].tolist()
    return sorted(set(found))


def refuse_non_finite(tensors: dict[str, Tensor], where: str, step: int, kept: str) -> None:
    """The last net: what would be written holds no NaN and no infinity.

    Raises:
        UserError: it does.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"at step {step} '{name}' of the {where} holds NaN or infinity, and is not written; {kept}: "
                "lower optim.lr, or look at the data, and run again"
            )


def kept_buffers(modules: dict[str, nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """Buffers and copies of them: a forward pass moves the statistics of norms before its loss is known to be bad."""
    return [(buffer, buffer.clone()) for module in modules.values() for buffer in module.buffers()]


class LossWatch:
    """Tells losses far above their recent past: by `deviations` of a running mean, once it knows `warm_up` losses.

    It watches the logarithm: losses are positive, and fall over decades.
    """

    def __init__(self, deviations: float = 6.0, warm_up: int = 50, rate: float = 0.02) -> None:
        self.deviations = deviations
        self.warm_up = warm_up
        self.rate = rate
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def usual(self) -> float:
        """The loss that is usual now."""
        return math.exp(self.mean)

    def spike(self, loss: float) -> bool:
        """Whether `loss` is one; it is remembered either way."""
        value = math.log(max(loss, 1e-12))
        distance = value - self.mean
        spike = self.count >= self.warm_up and distance > max(self.deviations * math.sqrt(self.variance), math.log(2))
        self.count += 1
        rate = max(self.rate, 1 / self.count)
        self.mean += rate * distance
        self.variance = (1 - rate) * (self.variance + rate * distance**2)
        return spike
