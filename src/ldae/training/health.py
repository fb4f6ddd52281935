"""Checks of training health: non-finite values, the samples that may cause them, and spikes of the loss."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ldae.data.stream import Batch
from ldae.utils.errors import UserError


def suspect_samples(micro_batches: Sequence[Batch]) -> list[int]:
    """Numbers of the training samples that may cause a non-finite loss or gradient.

    From every micro-batch: the samples with a non-finite value among their own data, or all its samples if there are
    none.
    """
    found: list[int] = []
    for batch in micro_batches:
        index = np.asarray(batch["index"])
        bad = np.zeros(len(index), dtype=bool)
        for value in batch.values():
            if isinstance(value, Tensor) and value.is_floating_point() and len(value) == len(index):
                bad |= ~torch.isfinite(value).reshape(len(index), -1).all(dim=1).cpu().numpy()
        found += index[bad if bad.any() else slice(None)].tolist()
    return sorted(set(found))


def refuse_non_finite(tensors: Mapping[str, Tensor], what: str, step: int, newest: str) -> None:
    """Refuse to write non-finite tensors.

    Args:
        what: the module or state that the tensors belong to.
        newest: description of the newest checkpoint, for the error message.

    Raises:
        UserError: a tensor contains NaN or infinity.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"at step {step} '{name}' of the {what} contains NaN or infinity and is not written; {newest}: "
                "lower optim.lr, or look at the data, and run again"
            )


class BufferBackup:
    """Restores the buffers of a module after a skipped step.

    Batch norms update their running statistics in the forward pass, before it is known whether the loss is finite. The
    copies are allocated once, and whether they are restored is decided on the device.
    """

    def __init__(self, module: nn.Module) -> None:
        self.buffers = list(module.buffers())
        self.copies = [buffer.clone() for buffer in self.buffers]
        self.saved = False

    @torch.no_grad()
    def save(self) -> None:
        """Copy the buffers; further calls before `restore` do nothing."""
        if self.saved:
            return
        self.saved = True
        for copy, buffer in zip(self.copies, self.buffers, strict=True):
            copy.copy_(buffer)

    @torch.no_grad()
    def restore(self, skipped: Tensor) -> None:
        """Restore the buffers if `skipped` (0-d) is 1."""
        self.saved = False
        for copy, buffer in zip(self.copies, self.buffers, strict=True):
            buffer.copy_(torch.where(skipped > 0, copy, buffer))


class SpikeDetector:
    """Detects losses far above the recent ones.

    It works on the logarithm of the loss, because losses are positive and fall over orders of magnitude.

    Args:
        deviations: a spike is more than this number of standard deviations, and more than a factor of 2, above the
            running mean.
        warm_up: number of losses before spikes are reported.
        rate: weight of a new loss in the running mean and variance.
    """

    def __init__(self, deviations: float = 6.0, warm_up: int = 50, rate: float = 0.02) -> None:
        self.deviations = deviations
        self.warm_up = warm_up
        self.rate = rate
        self.count, self.mean, self.variance = 0, 0.0, 0.0

    def usual_loss(self) -> float:
        """Running geometric mean of the losses."""
        return math.exp(self.mean)

    def is_spike(self, loss: float) -> bool:
        """Whether `loss` is a spike. It enters the running mean in any case."""
        value = math.log(max(loss, 1e-12))
        distance = value - self.mean
        spike = self.count >= self.warm_up and distance > max(self.deviations * math.sqrt(self.variance), math.log(2))
        self.count += 1
        rate = max(self.rate, 1 / self.count)
        self.mean += rate * distance
        self.variance = (1 - rate) * (self.variance + rate * distance**2)
        return spike
