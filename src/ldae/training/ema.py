"""Exponential moving average of a module's weights, one update per optimiser step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages the floating-point tensors of `module` (buffers too, so that norms match their weights).

    The decay of step n (from 0) is min(decay, (1 + n) / (10 + n)): the first steps do not remember the initialisation.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay
        self.shadow = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the module, after optimiser step number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = self.module.state_dict()
        averaged = [name for name, tensor in self.shadow.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.shadow[n] for n in averaged], [current[n] for n in averaged], 1 - decay)
        for name in self.shadow.keys() - set(averaged):
            self.shadow[name].copy_(current[name])

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
