"""The network of the diffusion prior: a deep MLP whose every layer sees its input again (DiffAE, arXiv 2111.15640).

Each layer is Linear, LayerNorm, a scale by the condition, SiLU; its output is concatenated with the network's input.
"""

import torch
from torch import Tensor, nn

from ldae.models.blocks import time_features, zero_module

TIME_WIDTH = 64


class Layer(nn.Module):
    """One layer, (B, inputs) -> (B, width), scaled by the condition (B, width)."""

    def __init__(self, inputs: int, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        self.norm = nn.LayerNorm(width)
        self.scale = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """See the class."""
        h = self.norm(self.linear(x))  # (B, width)
        return self.dropout(nn.functional.silu(h * (1 + self.scale(condition))))


class SkipMlp(nn.Module):
    """(u_t, t, condition) -> (B, components), 0 before training.

    Args:
        components: width of u.
        conditions: width of the condition; 0: none.
        width: of the layers.
        depth: number of layers, at least 1.
        dropout: after every layer.
    """

    def __init__(self, components: int, conditions: int, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(TIME_WIDTH, width), nn.SiLU(), nn.Linear(width, width))
        self.condition = nn.Linear(conditions, width, bias=False)
        inputs = [components, *[width + components] * (depth - 1)]
        self.layers = nn.ModuleList(Layer(size, width, dropout) for size in inputs)
        self.output = zero_module(nn.Linear(width, components))

    def forward(self, u_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """u_t (B, components), t (B,), condition (B, conditions)."""
        embedding = nn.functional.silu(self.time(time_features(t, TIME_WIDTH)) + self.condition(condition))
        h = u_t[:, :0]
        for layer in self.layers:
            h = layer(torch.cat([h, u_t], 1), embedding)  # (B, width)
        return self.output(h)
