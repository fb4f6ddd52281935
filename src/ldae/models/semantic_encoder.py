"""The semantic encoder Enc_phi(x) -> y: 2.5D. A CNN reads every slice, attention weighs them (arXiv 2504.08635).

tokens = CNN(slices) + positions; a query, the softmax-weighted mean of the tokens, attends to them; LayerNorm -> y.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from ldae.models.blocks import MAX_PERIOD, run
from ldae.utils.errors import UserError


def sinusoidal_positions(count: int, dim: int) -> Tensor:
    """Fixed positions, (1, count, dim): sines at even, cosines at odd indices (arXiv 1706.03762, section 3.5)."""
    # On the CPU whatever the default device: a constant has values on the meta device too.
    position = torch.arange(count, dtype=torch.float32, device="cpu")[:, None]
    even = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu")
    angles = position * torch.exp(even * (-math.log(MAX_PERIOD) / dim))
    table = torch.zeros(1, count, dim, device="cpu")
    table[0, :, 0::2] = angles.sin()
    table[0, :, 1::2] = angles.cos()[:, : dim // 2]
    return table


class SemanticEncoder(nn.Module):
    """(B, 1, X, Y, Z) -> y (B, dim).

    Args:
        backbone: maps slices (N, 1, H, W) to (N, C); says its C as `out_channels`. Where C is not `dim`, a Linear
            between them is learned.
        slices: number of slices, the volume's size along `axis`.
        axis: 0, 1, 2 for x, y, z: sagittal, coronal, axial slices.
        checkpointing: volumes go through the backbone one by one and again in the backward pass.
        slice_dropout: share of slices that a training step leaves out (drawn anew by sample), and need not compute.
        reference: shape (X, Y, Z) of a reference volume that `set_reference` sets once, before training, to the mean
            of the training scans; None: none, as published. With it, y = LayerNorm(f(d) - f(0)) of the difference
            d = (x - reference) / spread: what all brains share is taken out. From random weights it is nearly all there
            is, so that the estimator sees a constant and learns to ignore it.
        gated: each token is multiplied by 1 + Linear(position), so that the same picture means something else at
            another height; None of it, as published, leaves an average over slices.
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
        reference: Sequence[int] | None = None,
        gated: bool = False,
    ) -> None:
        super().__init__()
        if axis not in (0, 1, 2) or not 0 <= slice_dropout < 1:
            raise UserError(f"model.encoder: axis={axis} must be 0, 1 or 2 and slice_dropout={slice_dropout} in [0, 1)")
        self.dim = dim
        self.axis = axis
        self.slices = slices
        self.checkpointing = checkpointing
        self.slice_dropout = slice_dropout
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
        self.gate = nn.Linear(dim, dim) if gated else None
        if reference is not None and reference[axis] != slices:
            raise UserError(
                f"model.encoder: reference={list(reference)} does not have {slices} slices along axis {axis}"
            )
        self.register_buffer("reference", None if reference is None else torch.zeros(1, 1, *reference))
        self.register_buffer("spread", None if reference is None else torch.ones(()))

    @torch.no_grad()
    def set_reference(self, mean: Tensor, spread: Tensor) -> None:
        """What y is measured from, before training: the mean of the training scans, (1, 1, X, Y, Z), and the root mean
        square of their differences from it, a scalar; unscaled, they would drown in the LayerNorm's epsilon."""
        self.reference.copy_(mean)
        self.spread.copy_(spread)

    def _kept(self, x: Tensor) -> Tensor:
        """Numbers of the slices that are read, (B, S'), ascending: all of them, but for slice dropout in training."""
        batch, count = len(x), self.slices
        if not (self.training and self.slice_dropout):
            return torch.arange(count, device=x.device).expand(batch, count)
        kept = max(1, round(count * (1 - self.slice_dropout)))
        return torch.rand(batch, count, device=x.device).argsort(dim=1)[:, :kept].sort(dim=1).values

    def _slices(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slices to read, (B, S', 1, H, W), and their numbers, (B, S')."""
        if x.ndim != 5 or x.shape[2 + self.axis] != self.slices:
            raise UserError(
                f"volumes of shape {tuple(x.shape)} do not have {self.slices} slices along axis {self.axis}, "
                "for which the encoder was built"
            )
        if self.reference is not None:
            x = (x - self.reference) / self.spread
        slices = x.movedim(2 + self.axis, 1)
        kept = self._kept(x)
        if kept.shape[1] < self.slices:
            slices = slices[torch.arange(len(x), device=x.device)[:, None], kept]
        return slices, kept

    def _read(self, slices: Tensor) -> Tensor:
        """(B, S', 1, H, W) -> (B, S', dim)."""
        # One volume at a time when checkpointing: the activations of a single one exist at any moment.
        groups = slices.unbind(0) if self.checkpointing else [slices.flatten(0, 1)]
        read = torch.cat([self._pictures(group) for group in groups])  # (B S', C)
        return self.widen(read).unflatten(0, slices.shape[:2])

    def _pictures(self, slices: Tensor) -> Tensor:
        """(N, 1, H, W) -> (N, C). On a CPU, where no gradient is asked for, all blank slices are read as one: a head
        leaves a quarter of them empty. A GPU would have to wait to know how many there are."""
        if self.training or torch.is_grad_enabled() or slices.device.type != "cpu":
            return run(self.backbone, self.checkpointing, slices)
        blank = (slices == 0).flatten(1).all(dim=1)
        read = ~blank | (blank.cumsum(dim=0) == 1)  # the first blank one stands for the others
        place = read.cumsum(dim=0) - 1
        place = torch.where(blank, place[blank.int().argmax()], place)
        return self.backbone(slices[read])[place]

    def _tokens(self, read: Tensor, kept: Tensor) -> Tensor:
        """What was read of the slices, (B, S', dim), and their numbers, (B, S'), to tokens, (B, S', dim)."""
        positions = self.positions[0, kept]
        if self.gate is not None:
            read = read * (1 + self.gate(self.positions[0]))[kept]
        return self.dropout(read + positions)

    def _attend(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, S', dim) to (B, dim) and the weights of each head (B, heads, S').

        One query needs no keys and values of its own: the key's matrices are applied to the query, q.(W t) = (W'q).t,
        and the value's to the weighted mean of the tokens, so that the cost hardly grows with the slices. What the
        keys' biases add is the same for all slices and cancels in the softmax.
        """
        shares = self.score(tokens).softmax(dim=1)  # (B, S', 1)
        mean = (shares * tokens).sum(dim=1)  # (B, dim)
        attention = self.cross_attention
        heads, size = attention.num_heads, attention.head_dim
        to_query, to_key, to_value = attention.in_proj_weight.chunk(3)
        query_bias, _, value_bias = attention.in_proj_bias.chunk(3)
        query = linear(self.query(mean), to_query, query_bias).unflatten(1, (heads, size)) / math.sqrt(size)
        query = torch.einsum("bhk,hkd->bhd", query, to_key.unflatten(0, (heads, size)))
        # The bias changes nothing, but several processes wait for its gradient, which is 0.
        scores = (query @ self.key.weight) @ tokens.mT + (query @ self.key.bias)[..., None]
        weights = scores.softmax(dim=2)
        used = dropout(weights, attention.dropout, self.training)
        total = used.sum(dim=2, keepdim=True)  # 1 but for dropout; what a bias adds to every value is added as often
        values = linear(used @ tokens, self.value.weight) + total * self.value.bias
        values = torch.einsum("bhd,hkd->bhk", values, to_value.unflatten(0, (heads, size)))
        values = values + total * value_bias.unflatten(0, (heads, size))
        return attention.out_proj(values.flatten(1)), weights

    def forward(self, x: Tensor) -> Tensor:
        """y (B, dim).

        Raises:
            UserError: the volume has another number of slices.
        """
        slices, kept = self._slices(x)
        if self.reference is None:
            return self.norm(self._attend(self._tokens(self._read(slices), kept))[0])
        # The reference's own slices are all empty now: one of them, read beside the others, speaks for all.
        read = self._read(torch.cat([slices, torch.zeros_like(slices[:, :1])], dim=1))
        read, empty = read[:, :-1], read[:, -1:].expand(-1, kept.shape[1], -1)
        # Small differences need float32.
        with torch.autocast(x.device.type, enabled=False):
            own, common = (self._attend(self._tokens(part.float(), kept))[0] for part in (read, empty))
            return self.norm(own - common)

    def attention(self, x: Tensor) -> Tensor:
        """How much the query looks at each slice, mean over heads: (B, slices), rows sum to 1."""
        slices, kept = self._slices(x)
        return self._attend(self._tokens(self._read(slices), kept))[1].mean(dim=1)
