"""The joint distribution of the labels themselves, from which a synthetic cohort draws what nobody asked for.

Categories: their joint frequencies, with half a subject added to each combination. Numbers: normal given the
categories, with means of each combination and one covariance, cut off at the range of the training scans. Labels that
are asked for change the others by Bayes' rule: AD at 60 is rarer than at 80, and so is 60 in AD.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ldae.prior.columns import Column
from ldae.utils.errors import UserError

MAX_COMBINATIONS = 256
ADDED = 0.5  # subjects that are added to each combination of categories
SHRINKAGE = 2.0  # subjects at the overall mean that are added to each combination's


class LabelDistribution(nn.Module):
    """Draws labels (C,) given some of them.

    Raises:
        UserError: there are too many combinations of categories.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__()
        sizes = [len(column.categories) for column in columns if column.categories is not None]
        self.categories = [i for i, column in enumerate(columns) if column.categories is not None]
        self.numbers = [i for i, column in enumerate(columns) if column.categories is None]
        count = math.prod(sizes)
        if count > MAX_COMBINATIONS:
            raise UserError(f"stage.columns: {count} combinations of categories are too many; name fewer columns")
        # Row g: the categories of combination g, (G, number of columns with categories).
        grids = torch.meshgrid(*[torch.arange(size, device="cpu") for size in sizes], indexing="ij") if sizes else []
        self._members = torch.stack([grid.flatten() for grid in grids], 1) if sizes else torch.zeros(1, 0, device="cpu")
        width = len(self.numbers)
        self.register_buffer("ends", torch.zeros(len(columns), 2, dtype=torch.float64))  # of numbers
        self.register_buffer("log_probability", torch.zeros(count, dtype=torch.float64))
        self.register_buffer("means", torch.zeros(count, width, dtype=torch.float64))
        self.register_buffer("covariance", torch.eye(width, dtype=torch.float64))

    @torch.no_grad()
    def fit(self, labels: Tensor, weights: Tensor, subjects: int) -> None:
        """Measure the distribution on training scans.

        Args:
            labels: (N, C), NaN where missing.
            weights: (N,), which add up to 1.
            subjects: number of subjects.
        """
        labels, weights = labels.double().cpu(), weights.double().cpu() * subjects
        member = self._matches(labels) * weights[:, None]  # (N, G); missing categories belong to several combinations
        member = member / self._matches(labels).sum(1, keepdim=True).clamp(min=1)
        numbers = labels[:, self.numbers]
        known = torch.isfinite(numbers).double()
        for column in self.numbers:
            values = labels[:, column][torch.isfinite(labels[:, column])]
            self.ends[column] = torch.stack([values.min(), values.max()])
        filled = torch.where(known > 0, numbers, 0.0)
        overall = (weights @ filled) / (weights @ known).clamp(min=1e-12)
        sums, counts = member.T @ filled, member.T @ known
        means = (sums + SHRINKAGE * overall) / (counts + SHRINKAGE)
        share = member / member.sum(1, keepdim=True).clamp(min=1e-12)
        rest = (filled - share @ means) * known
        pairs = known.T @ (weights[:, None] * known)
        counted = member.sum(0) + ADDED
        self.log_probability.copy_((counted / counted.sum()).log())
        self.means.copy_(means)
        covariance = rest.T @ (weights[:, None] * rest) / pairs.clamp(min=1e-12)
        self.covariance.copy_(covariance + 1e-9 * torch.diag(covariance.diagonal().clamp(min=1e-12)))

    @torch.no_grad()
    def draw(self, given: Tensor, noise: Tensor) -> Tensor:
        """Complete labels (C,) float32.

        Args:
            given: (C,), NaN where a label is to be drawn.
            noise: (1 + C,) standard normal; the first chooses the combination of categories.
        """
        given, noise = given.double().cpu(), noise.double().cpu()
        drawn = given.clone()
        fixed = torch.isfinite(given[self.numbers])
        log_share = self.log_probability.cpu() + self._matches(given[None])[0].log()
        means, covariance = self.means.cpu(), self.covariance.cpu()
        gap = given[self.numbers][fixed] - means[:, fixed]  # (G, number of given numbers)
        inner = covariance[fixed][:, fixed]
        if fixed.any():
            log_share = log_share - 0.5 * (gap * torch.linalg.solve(inner, gap.T).T).sum(1)
        cumulative = log_share.softmax(0).cumsum(0)
        group = int((cumulative < 0.5 * (1 + torch.erf(noise[0] / math.sqrt(2)))).sum().clamp(max=len(cumulative) - 1))
        drawn[self.categories] = self._members[group].double()
        free = ~fixed
        if free.any():
            drawn[torch.tensor(self.numbers)[free]] = self._draw_numbers(group, gap[group], fixed, noise[1:])
        return drawn.float()

    def _draw_numbers(self, group: int, gap: Tensor, fixed: Tensor, noise: Tensor) -> Tensor:
        """The numbers that are not given, of one combination, cut off at the range of the training scans."""
        means, covariance, free = self.means.cpu()[group], self.covariance.cpu(), ~fixed
        mean, rest = means[free], covariance[free][:, free]
        if fixed.any():
            slopes = torch.linalg.solve(covariance[fixed][:, fixed], covariance[fixed][:, free])
            mean, rest = mean + gap @ slopes, rest - covariance[free][:, fixed] @ slopes
        found = mean + torch.linalg.cholesky(rest) @ noise[self.numbers][free]
        return found.clamp(*self.ends.cpu()[self.numbers][free].T)

    def _matches(self, labels: Tensor) -> Tensor:
        """1 where the known categories of labels (N, C) are those of a combination, else 0, (N, G) float64."""
        wanted = labels[:, None, self.categories]  # (N, 1, categories)
        return ((wanted == self._members) | ~torch.isfinite(wanted)).all(2).double()
