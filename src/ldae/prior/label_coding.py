"""Labels as features of a network: numbers standardised, categories one-hot, missing ones as zeros with a flag."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldae.prior.columns import Column


class Coded(NamedTuple):
    """Labels of B scans as features.

    Attributes:
        features: (B, F); 0 on average over the training scans, and 0 where a label is missing.
        present: (B, C), 1 where a label is known, else 0.
    """

    features: Tensor
    present: Tensor

    @property
    def given(self) -> Tensor:
        """Whether any label is known, (B, 1) bool."""
        return self.present.any(1, keepdim=True) if self.present.shape[1] else torch.zeros_like(self.present[:, :1])


class LabelCoding(nn.Module):
    """Labels (B, C), NaN where missing (ldae.prior.columns), to `Coded`."""

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__()
        self.sizes = [1 if column.categories is None else len(column.categories) for column in columns]
        self.is_number = [column.categories is None for column in columns]
        self.register_buffer("centre", torch.zeros(self.width))
        self.register_buffer("size", torch.ones(self.width))

    @property
    def width(self) -> int:
        """Number of features, F."""
        return sum(self.sizes)

    @torch.no_grad()
    def fit(self, labels: Tensor, weights: Tensor) -> None:
        """Measure means, and the standard deviations of numbers, on training scans (N, C) with weights (N,)."""
        self.centre.zero_()
        self.size.fill_(1)
        raw, known = self._raw(labels)
        weights = weights[:, None] * known
        total = weights.sum(0).clamp(min=1e-12)
        self.centre.copy_((weights * raw).sum(0) / total)
        variance = (weights * (raw - self.centre).square()).sum(0) / total
        numbers = torch.tensor([n for n, size in zip(self.is_number, self.sizes, strict=True) for _ in range(size)])
        self.size.copy_(torch.where(numbers.to(variance.device), variance.sqrt().clamp(min=1e-6), 1.0))

    def forward(self, labels: Tensor) -> Coded:
        """Labels (B, C) as features (B, F) and flags (B, C)."""
        raw, known = self._raw(labels)
        return Coded((raw - self.centre) / self.size * known, torch.isfinite(labels).float())

    def _raw(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers and one-hot categories before standardisation, and whether each is known, (B, F) each."""
        values, known = [labels.new_zeros(len(labels), 0)], [labels.new_zeros(len(labels), 0)]
        for index, (size, number) in enumerate(zip(self.sizes, self.is_number, strict=True)):
            label = labels[:, index : index + 1]
            finite = torch.isfinite(label)
            filled = torch.where(finite, label, 0.0)
            values.append(filled if number else (filled == torch.arange(size, device=label.device)).float())
            known.append(finite.float().expand(-1, size))
        return torch.cat(values, 1), torch.cat(known, 1)
