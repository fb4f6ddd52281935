"""The supervised twin of y: the semantic encoder with a linear head, trained end to end on one label.

It answers what labels would have given the same encoder (arXiv 2504.08635, the table of probes: "supervised, same
encoder"). The encoder keeps its architecture and its start, but nothing in it is frozen: of an encoder of principal
components, mean and components become parameters (`ComponentsEncoder.make_trainable`), so that its twin is a linear
network that starts as principal components with a linear reading.
"""

import torch
from torch import Tensor, nn

from ldae.models.blocks import full_precision, zero_module


class SupervisedNetwork(nn.Module):
    """Views of scans (B, C, X, Y, Z) -> one number of each scan.

    The head starts at 0, so that before training every scan gets the same prediction.

    Args:
        encoder: views (B, C, X, Y, Z) -> y (B, dim), with the attribute `dim`.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        for module in encoder.modules():
            if hasattr(module, "make_trainable"):
                module.make_trainable()
        self.encoder = encoder.requires_grad_(True)
        self.head = zero_module(nn.Linear(encoder.dim, 1))
        self.register_buffer("mean", torch.zeros(()))  # of the label, over the training scans
        self.register_buffer("std", torch.ones(()))

    @torch.no_grad()
    def set_label_scale(self, mean: float, std: float) -> None:
        """Store mean and standard deviation of a number over the training scans; a class keeps 0 and 1."""
        self.mean.fill_(mean)
        self.std.fill_(std)

    def forward(self, x: Tensor) -> Tensor:
        """Views (B, C, X, Y, Z) -> log-odds of the positive class, or the standardised number, (B,) float32."""
        y = self.encoder(x)
        with full_precision(x):
            return self.head(y.float())[:, 0]

    def decision(self, x: Tensor) -> Tensor:
        """Views (B, C, X, Y, Z) -> log-odds of the positive class, or the number in its own unit, (B,) float32."""
        return self.mean + self.std * self(x)
