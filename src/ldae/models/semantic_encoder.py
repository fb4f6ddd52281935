"""The semantic encoder Enc_phi(x) -> y: 2.5D. A CNN reads every slice, attention weighs them (arXiv 2504.08635).

tokens = CNN(slices) + positions; a query, the softmax-weighted mean of the tokens, attends to them; LayerNorm -> y.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ldae.errors import UserError
from ldae.models.blocks import MAX_PERIOD, run


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
        calibrated: y is centred and scaled by constants that `calibrate` measures once, before training. From random
            weights all brains give nearly the same y (its spread over scans is 1/90 of its size), so that the
            estimator sees a constant and learns to ignore it; pre-trained and released encoders need none of this.
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
        calibrated: bool = False,
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
        self.calibrated = calibrated
        if calibrated:
            self.register_buffer("centre", torch.zeros(dim))
            self.register_buffer("spread", torch.ones(dim))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Measure the centre and the spread of y over scans, (B, 1, X, Y, Z) each; before training, in eval mode."""
        y = torch.cat([self.norm(self._attend(x, weights=False)[0].squeeze(1)).float() for x in batches])
        spread = y.std(0)
        self.centre.copy_(y.mean(0))
        self.spread.copy_(spread.clamp_min(0.1 * spread.median()))

    def _kept(self, x: Tensor) -> Tensor:
        """Numbers of the slices that are read, (B, S'), ascending: all of them, but for slice dropout in training."""
        batch, count = len(x), self.slices
        if not (self.training and self.slice_dropout):
            return torch.arange(count, device=x.device).expand(batch, count)
        kept = max(1, round(count * (1 - self.slice_dropout)))
        return torch.rand(batch, count, device=x.device).argsort(dim=1)[:, :kept].sort(dim=1).values

    def _tokens(self, x: Tensor) -> Tensor:
        """(B, 1, X, Y, Z) -> (B, S', dim), positions added."""
        if x.ndim != 5 or x.shape[2 + self.axis] != self.slices:
            raise UserError(
                f"volumes of shape {tuple(x.shape)} do not have {self.slices} slices along axis {self.axis}, "
                "for which the encoder was built"
            )
        slices = x.movedim(2 + self.axis, 1)  # (B, S, 1, H, W)
        kept = self._kept(x)
        if kept.shape[1] < self.slices:
            slices = slices[torch.arange(len(x), device=x.device)[:, None], kept]
        # One volume at a time when checkpointing: the activations of a single one exist at any moment.
        groups = slices.unbind(0) if self.checkpointing else [slices.flatten(0, 1)]
        read = torch.cat([run(self.backbone, self.checkpointing, group) for group in groups])  # (B S', C)
        tokens = self.widen(read).unflatten(0, kept.shape)
        return self.dropout(tokens + self.positions[0, kept])

    def _attend(self, x: Tensor, weights: bool) -> tuple[Tensor, Tensor | None]:
        tokens = self._tokens(x)
        shares = self.score(tokens).softmax(dim=1)  # (B, S', 1)
        mean = (shares * tokens).sum(dim=1, keepdim=True)  # (B, 1, dim)
        query, key, value = self.query(mean), self.key(tokens), self.value(tokens)
        return self.cross_attention(query, key, value, need_weights=weights)

    def forward(self, x: Tensor) -> Tensor:
        """y (B, dim).

        Raises:
            UserError: the volume has another number of slices.
        """
        y = self.norm(self._attend(x, weights=False)[0].squeeze(1))
        return (y - self.centre) / self.spread if self.calibrated else y

    def attention(self, x: Tensor) -> Tensor:
        """How much the query looks at each slice, mean over heads: (B, slices), rows sum to 1."""
        return self._attend(x, weights=True)[1].squeeze(1)
