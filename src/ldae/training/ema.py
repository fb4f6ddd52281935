"""Exponential moving average of a module's weights, one update per optimiser step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Moving average of the floating-point tensors of a module, including buffers, so that norms match their weights.

    Args:
        module: the module whose weights are averaged.
        decay: weight of the previous average in each update.
        warmup: in step n, counted from 0, use the decay min(decay, (1 + n) / (10 + n)), so that the initial weights
            soon lose their influence. False uses `decay` in every step, as published.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = True) -> None:
        self.module = module
        self.decay = decay
        self.warmup = warmup
        # References to the tensors of the module, collected once, so that a step need not traverse the module.
        current = module.state_dict()
        self.shadow = {name: tensor.detach().clone() for name, tensor in current.items()}
        averaged = [name for name, tensor in current.items() if tensor.is_floating_point()]
        self._current = [current[name] for name in averaged]
        self._averaged = [self.shadow[name] for name in averaged]
        self._copied = [(self.shadow[name], current[name]) for name in current.keys() - set(averaged)]

    def decay_at(self, step: int) -> float:
        """The decay of optimiser step number `step`."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor | None = None) -> None:
        """Update the average after optimiser step number `step`, unless `skipped` (0-d, on the device) is 1."""
        share = 1 - self.decay_at(step)
        if skipped is None:
            torch._foreach_lerp_(self._averaged, self._current, share)
        else:
            weight = (1 - skipped) * share
            if skipped.device.type == "cuda":  # where the interpolation below is one kernel for each tensor
                change = torch._foreach_sub(self._current, self._averaged)
                torch._foreach_mul_(change, weight)
                torch._foreach_add_(self._averaged, change)
            else:
                torch._foreach_lerp_(self._averaged, self._current, [weight] * len(self._averaged))
        for shadow, current in self._copied:
            shadow.copy_(current)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors, by their names in the module."""
        return self.shadow

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Overwrite the averaged tensors."""
        for name, tensor in self.shadow.items():
            tensor.copy_(tensors[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the module has the averaged weights."""
        raw = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        try:
            self.module.load_state_dict(self.shadow)
            yield
        finally:
            self.module.load_state_dict(raw)
