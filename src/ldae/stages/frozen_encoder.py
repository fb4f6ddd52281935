"""An encoder that is not trained, in the training of what reads y: y of a scan is computed once."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn


def is_frozen(encoder: nn.Module) -> bool:
    """Whether an encoder has nothing to train."""
    return not any(parameter.requires_grad for parameter in encoder.parameters())


class KnownEmbeddings:
    """y of the training scans by a frozen encoder, each computed when it is first needed.

    Each is computed by itself, because results are rounded differently in a batch of other scans: a training that is
    resumed gets the same to the bit.

    Args:
        encoder: (B, C, X, Y, Z) -> (B, dim), on the device.
        count: number of training scans.
    """

    def __init__(self, encoder: Callable[[Tensor], Tensor], dim: int, count: int, device: torch.device) -> None:
        self.encoder = encoder
        self.y = torch.zeros(count, dim, device=device)
        self.known = np.zeros(count, dtype=bool)

    def has(self, index: np.ndarray) -> bool:
        """Whether y of all these training samples is known, so that nothing of them needs to be read."""
        return bool(self.known[index].all())

    @torch.no_grad()
    def __call__(self, index: np.ndarray, place: Tensor, x: Tensor | None) -> Tensor:
        """y of training samples, (B, dim) float32.

        Args:
            index: their numbers, (B,).
            place: the same numbers on the device.
            x: their views, (B, C, X, Y, Z); not needed if all are known.
        """
        if x is not None:
            self.y[place] = torch.cat([self.encoder(view[None]).float() for view in x])
            self.known[index] = True
        return self.y[place]
