"""Exponential moving average of a module's weights, one update per optimiser step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages the floating-point tensors of `module` (buffers too, so that norms match their weights).

    Args:
        module: whose weights are averaged.
        decay: share of the average that a step keeps.
        warmup: in step n (from 0) the decay is min(decay, (1 + n) / (10 + n)), so that the average soon forgets the
            initial weights. False: `decay` in every step, as published.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = True) -> None:
        self.module = module
        self.decay = decay
        self.warmup = warmup
        # Aliases of the module's tensors, taken once: a step need not walk the module.
        current = module.state_dict()
        self.shadow = {name: tensor.detach().clone() for name, tensor in current.items()}
        averaged = [name for name, tensor in current.items() if tensor.is_floating_point()]
        self._current = [current[name] for name in averaged]
        self._averaged = [self.shadow[name] for name in averaged]
        self._copied = [(self.shadow[name], current[name]) for name in current.keys() - set(averaged)]

    def decay_at(self, step: int) -> float:
        """The decay in optimiser step number `step`."""
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor | None = None) -> None:
        """Move the average towards the module, after optimiser step number `step`; not where `skipped` (0-d) is 1."""
        share = 1 - self.decay_at(step)
        if skipped is None:
            torch._foreach_lerp_(self._averaged, self._current, share)
        else:
            weight = (1 - skipped) * share
            torch._foreach_lerp_(self._averaged, self._current, [weight] * len(self._averaged))
        for shadow, current in self._copied:
            shadow.copy_(current)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors, under the module's names."""
        return self.shadow

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restore the averaged tensors in place."""
        for name, tensor in self.shadow.items():
            tensor.copy_(tensors[name])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module holds the averaged weights."""
        raw = {name: tensor.detach().clone() for name, tensor in self.module.state_dict().items()}
        try:
            self.module.load_state_dict(self.shadow)
            yield
        finally:
            self.module.load_state_dict(raw)
