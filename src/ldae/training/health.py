"""What goes wrong in a step: losses and gradients that are no numbers, losses far above the others."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ldae.data.stream import Batch
from ldae.utils.errors import UserError


def suspect_samples(micro_batches: Sequence[Batch]) -> list[int]:
    """Training samples that may be at fault: those that hold NaN themselves, or else all."""
    found: list[int] = []
    for batch in micro_batches:
        index = np.asarray(batch["index"])
        bad = np.zeros(len(index), dtype=bool)
        for value in batch.values():
            if isinstance(value, Tensor) and value.is_floating_point() and len(value) == len(index):
                bad |= ~torch.isfinite(value).reshape(len(index), -1).all(dim=1).cpu().numpy()
        found += index[bad if bad.any() else slice(None)].tolist()
    return sorted(set(found))


def refuse_non_finite(tensors: dict[str, Tensor], where: str, step: int, kept: str) -> None:
    """Refuse to write tensors that hold NaN or infinity.

    Raises:
        UserError: it does.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"at step {step} '{name}' of the {where} holds NaN or infinity, and is not written; {kept}: "
                "lower optim.lr, or look at the data, and run again"
            )


class BufferBackup:
    """Puts a module's buffers back after a skipped step: norms move their statistics before a loss is known to be bad.

    The copies are made once and overwritten at every step; what is put back is decided on the device.
    """

    def __init__(self, module: nn.Module) -> None:
        self.buffers = list(module.buffers())
        self.copies = [buffer.clone() for buffer in self.buffers]
        self.kept = False

    @torch.no_grad()
    def save(self) -> None:
        """Remember the buffers as they are now, once until `restore`."""
        if self.kept:
            return
        self.kept = True
        for copy, buffer in zip(self.copies, self.buffers, strict=True):
            copy.copy_(buffer)

    @torch.no_grad()
    def restore(self, skipped: Tensor) -> None:
        """Put them back where `skipped` (0-d) is 1."""
        self.kept = False
        for copy, buffer in zip(self.copies, self.buffers, strict=True):
            buffer.copy_(torch.where(skipped > 0, copy, buffer))


class SpikeDetector:
    """Tells losses far above their recent past: by `deviations` of a running mean, once it knows `warm_up` losses.

    It watches the logarithm: losses are positive, and fall over decades.
    """

    def __init__(self, deviations: float = 6.0, warm_up: int = 50, rate: float = 0.02) -> None:
        self.deviations = deviations
        self.warm_up = warm_up
        self.rate = rate
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def usual_loss(self) -> float:
        """The loss that is usual now."""
        return math.exp(self.mean)

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` is one; it is remembered either way."""
        value = math.log(max(loss, 1e-12))
        distance = value - self.mean
        spike = self.count >= self.warm_up and distance > max(self.deviations * math.sqrt(self.variance), math.log(2))
        self.count += 1
        rate = max(self.rate, 1 / self.count)
        self.mean += rate * distance
        self.variance = (1 - rate) * (self.variance + rate * distance**2)
        return spike
