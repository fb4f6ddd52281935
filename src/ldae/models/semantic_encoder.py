"""The semantic encoder y = Enc_phi(x): a 2D CNN reads every slice of a scan, attention weighs the slices (2.5D).

tokens = CNN(slices) + positions; the query W_q g, with g the softmax-weighted mean of the tokens, attends to the
tokens; LayerNorm -> y (arXiv 2504.08635, section on the semantic encoder).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldae.models.blocks import MAX_PERIOD, full_precision, run_block
from ldae.utils.errors import UserError


def sinusoidal_positions(count: int, dim: int) -> Tensor:
    """Fixed positions, (1, count, dim): sines at even, cosines at odd indices (arXiv 1706.03762, section 3.5)."""
    # On the CPU even if the network is built on the meta device, because no file of weights contains this table.
    position = torch.arange(count, dtype=torch.float32, device="cpu")[:, None]
    even = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")
    angles = position * torch.exp(even * (-math.log(MAX_PERIOD) / dim))
    table = torch.zeros(1, count, dim, device="cpu")
    table[0, :, 0::2] = angles.sin()
    table[0, :, 1::2] = angles.cos()[:, : dim // 2]
    return table


def _check_slicing(axis: int, slices: int, slice_dropout: float, mean_volume_shape: Sequence[int] | None) -> None:
    """Refuse arguments of SemanticEncoder that do not fit together."""
    if axis not in (0, 1, 2) or not 0 <= slice_dropout < 1:
        raise UserError(f"model.encoder: axis={axis} must be 0, 1 or 2 and slice_dropout={slice_dropout} in [0, 1)")
    if mean_volume_shape is not None and mean_volume_shape[axis] != slices:
        raise UserError(
            f"model.encoder: mean_volume_shape={list(mean_volume_shape)} does not have {slices} slices along axis "
            f"{axis}; give it the shape of the volumes"
        )


class SemanticEncoder(nn.Module):
    """Views of scans (B, channels, X, Y, Z) in [0, 1] -> y (B, dim).

    Args:
        backbone: a network from slices (N, channels, H, W) to features (N, C). Its attribute `out_channels` is C
            (without it: `dim`). If C differs from `dim`, a learned Linear maps the features to `dim`.
        slices: number of slices, the size of the volume along `axis`.
        dim: width of tokens and y.
        heads: heads of the attention.
        dropout: of the tokens and of the attention weights.
        axis: axis that is sliced: 0 (sagittal), 1 (coronal) or 2 (axial slices, as published).
        checkpointing: volumes pass the backbone one by one, and again in the backward pass. This takes less memory.
        slice_dropout: share of the slices of each scan that a training step leaves out, at random, and does not
            compute. 0: none, as published.
        mean_volume_shape: shape (X, Y, Z) of the mean training scan, which `set_mean_volume` stores before training.
            With it, y = LayerNorm(f(d) - f(0)) of the scaled difference d = (x - mean) / difference_std, so that what
            all brains share is removed. Untrained, an encoder of x itself returns nearly the same y for all scans, and
            the estimator learns to ignore it. None: y = LayerNorm(f(x)), as published.
        position_gate: whether the features of a slice are multiplied by 1 + Linear(position), so that the same features
            mean something else at another height. False, as published.
        channels: number of channels of a view; the backbone must read as many. 1: T1 intensities, as published.
    """

    def __init__(
        self,
        backbone: nn.Module,
        slices: int,
        dim: int = 768,
        heads: int = 8,
        dropout: float = 0.1,
        axis: int = 2,
        checkpointing: bool = False,
        slice_dropout: float = 0.0,
        mean_volume_shape: Sequence[int] | None = None,
        position_gate: bool = False,
        channels: int = 1,
    ) -> None:
        super().__init__()
        _check_slicing(axis, slices, slice_dropout, mean_volume_shape)
        self.dim = dim
        self.axis = axis
        self.slices = slices
        self.checkpointing = checkpointing
        self.slice_dropout = slice_dropout
        self.channels = channels
        self.backbone = backbone
        width = getattr(backbone, "out_channels", dim)
        self.widen = nn.Identity() if width == dim else nn.Linear(width, dim)
        self.register_buffer("positions", sinusoidal_positions(slices, dim), persistent=False)
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(dim, 1)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.cross_attention = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, dim) if position_gate else None
        # The names under which files of weights store the mean volume and the standard deviation of differences from
        # it.
        mean = None if mean_volume_shape is None else torch.zeros(1, channels, *mean_volume_shape)
        self.register_buffer("reference", mean)
        self.register_buffer("spread", None if mean_volume_shape is None else torch.ones(()))

    fitted = ("reference", "spread")  # buffers that are measured before training, see models/fitted.py

    @property
    def mean_volume(self) -> Tensor | None:
        """The mean training scan, (1, channels, X, Y, Z), or None if the encoder has none."""
        return self.reference

    @property
    def difference_std(self) -> Tensor | None:
        """Root mean square of the training scans' differences from their mean, a scalar, or None without a mean."""
        return self.spread

    @torch.no_grad()
    def set_mean_volume(self, mean: Tensor, difference_std: Tensor) -> None:
        """Store the mean of the training scans, (1, C, X, Y, Z), and the root mean square of their differences from it.

        The differences are divided by it, because the LayerNorm's epsilon would exceed unscaled ones.
        """
        self.reference.copy_(mean)
        self.spread.copy_(difference_std)

    def choose_slices(self, x: Tensor) -> Tensor:
        """Indices of the slices that are read, (B, S), ascending: all of them unless slice dropout is at work."""
        batch, count = len(x), self.slices
        if not (self.training and self.slice_dropout):
            return torch.arange(count, device=x.device).expand(batch, count)
        kept = max(1, round(count * (1 - self.slice_dropout)))
        return torch.rand(batch, count, device=x.device).argsort(dim=1)[:, :kept].sort(dim=1).values

    def cut_slices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The slices of x that are read, (B, S, channels, H, W), and their indices along the axis, (B, S)."""
        if x.ndim != 5 or x.shape[1] != self.channels or x.shape[2 + self.axis] != self.slices:
            raise UserError(
                f"views of shape {tuple(x.shape)} do not have {self.slices} slices along axis {self.axis} of "
                f"{self.channels} channel(s), for which the encoder was built"
            )
        if self.mean_volume is not None:
            x = (x - self.mean_volume) / self.difference_std
        slices = x.movedim(2 + self.axis, 1)
        chosen = self.choose_slices(x)
        if chosen.shape[1] < self.slices:
            slices = slices[torch.arange(len(x), device=x.device)[:, None], chosen]
        return slices, chosen

    def read_slices(self, slices: Tensor) -> Tensor:
        """Features of the backbone: (N, channels, H, W) -> (N, C)."""
        return run_block(self.backbone, self.checkpointing, slices)

    def features(self, slices: Tensor) -> Tensor:
        """Features of each slice at the width of the tokens: (B, S, channels, H, W) -> (B, S, dim)."""
        # With checkpointing one volume at a time, so that the activations of only one exist at any moment.
        parts = slices.unbind(0) if self.checkpointing else [slices.flatten(0, 1)]
        read = torch.cat([self.read_slices(part) for part in parts])  # (B S, C)
        return self.widen(read).unflatten(0, slices.shape[:2])

    def tokens(self, features: Tensor, chosen: Tensor) -> Tensor:
        """Features (B, S, dim) of the slices with indices `chosen` (B, S), plus their positions: (B, S, dim)."""
        if self.gate is not None:
            features = features * (1 + self.gate(self.positions[0]))[chosen]
        return self.dropout(features + self.positions[0, chosen])

    def query_of(self, tokens: Tensor) -> Tensor:
        """W_q g, with g the softmax-weighted mean of the tokens: (B, S, dim) -> (B, 1, dim)."""
        shares = self.score(tokens).softmax(dim=1)  # (B, S, 1)
        return self.query((shares * tokens).sum(dim=1, keepdim=True))

    def attend(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of the query to the tokens (B, S, dim): the result, (B, dim), and its weights, (B, heads, S)."""
        query, key, value = self.query_of(tokens), self.key(tokens), self.value(tokens)
        y, weights = self.cross_attention(query, key, value, average_attn_weights=False)
        return y[:, 0], weights[:, :, 0]

    def forward(self, x: Tensor) -> Tensor:
        """Views (B, channels, X, Y, Z) -> y (B, dim).

        Raises:
            UserError: the views have another number of slices or channels than the encoder was built for.
        """
        slices, chosen = self.cut_slices(x)
        if self.mean_volume is None:
            return self.norm(self.attend(self.tokens(self.features(slices), chosen))[0])
        # All slices of d = 0 are equal: one of them, read together with those of the scan, gives the features of all.
        features = self.features(torch.cat([slices, torch.zeros_like(slices[:, :1])], dim=1))
        features, zero_features = features[:, :-1], features[:, -1:].expand(-1, chosen.shape[1], -1)
        with full_precision(x):  # 16 bits would round the small difference between the two away
            f_d, f_0 = (self.attend(self.tokens(part.float(), chosen))[0] for part in (features, zero_features))
            return self.norm(f_d - f_0)

    def attention(self, x: Tensor) -> Tensor:
        """Attention weight of each slice, mean over the heads: (B, slices). Each row sums to 1."""
        slices, chosen = self.cut_slices(x)
        return self.attend(self.tokens(self.features(slices), chosen))[1].mean(dim=1)
