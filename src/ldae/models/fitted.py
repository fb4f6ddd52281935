"""Buffers of encoders that are measured on the training scans before training, such as their mean or components.

A module names them in its attribute `fitted`.
"""

import torch
from torch import nn


@torch.no_grad()
def copy_fitted(source: nn.Module, target: nn.Module) -> None:
    """Copy what was measured on the training scans from one encoder to another of the same architecture."""
    for measured, other in zip(source.modules(), target.modules(), strict=True):
        for name in getattr(measured, "fitted", ()):
            if (buffer := getattr(measured, name)) is not None:
                getattr(other, name).copy_(buffer)
