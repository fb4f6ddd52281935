"""Learning rates over the course of training."""

import math
from collections.abc import Mapping

import torch

from ldae.config import Optim


def learning_rate_factor(step: int, total: int, optim: Optim) -> float:
    """Factor on the learning rate: linear warm-up times half a cosine, from 1 to `final_factor` at step `total`."""
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(total, 1)))
    return warm * (optim.final_factor + (1 - optim.final_factor) * cosine)


class LearningRates:
    """Sets the learning rates of optimisers: those they were built with, times `learning_rate_factor`."""

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer], total: int, optim: Optim) -> None:
        # Resuming replaces `param_groups`, so this keeps the optimisers rather than their groups.
        self.initial = [(optimizer, [g["lr"] for g in optimizer.param_groups]) for optimizer in optimizers.values()]
        self.total = total
        self.optim = optim

    def set(self, step: int) -> None:
        """Set the learning rates of optimiser step number `step`."""
        factor = learning_rate_factor(step, self.total, self.optim)
        for optimizer, rates in self.initial:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
