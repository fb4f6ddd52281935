"""Draws semantic vectors with their labels from a prior; draw i depends on (seed, i) and on what is asked for alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from ldae.prior.columns import parse_conditions
from ldae.prior.semantic_prior import SemanticPrior
from ldae.utils.seeding import draw_normal


@dataclass(frozen=True)
class SemanticDraws:
    """Semantic vectors of people who do not exist.

    Attributes:
        y: (B, dim).
        labels: (B, C), complete; see ldae.prior.columns.
        table: the same labels, one row for each.
    """

    y: Tensor
    labels: Tensor
    table: pd.DataFrame


def draw_semantics(
    prior: SemanticPrior,
    keys: Sequence[int],
    seed: int,
    where: Mapping[str, object] | None = None,
    gaussian: bool = False,
) -> SemanticDraws:
    """One draw for each key. Labels that are not asked for are drawn from their distribution given those that are.

    Each is drawn by itself, because sums round differently in a batch of others.

    Args:
        gaussian: see SemanticPrior.draw.

    Raises:
        UserError: `where` asks for a column or value that the prior does not know.
    """
    device = prior.whitening.mean.device
    given = parse_conditions(prior.columns, prior.labels.ends, where or {})
    noise = draw_normal((prior.components,), seed, keys, "prior/y").to(device)
    choice = draw_normal((1 + len(prior.columns),), seed, keys, "prior/labels")
    drawn = [prior.labels.draw(given, row) for row in choice]
    # A table holds six digits, and the scans are of exactly what it says.
    rows = [[column.decode(float(x)) for column, x in zip(prior.columns, label, strict=True)] for label in drawn]
    table = pd.DataFrame(rows, columns=[column.name for column in prior.columns], index=range(len(rows)))
    values = [[c.encode(x) for c, x in zip(prior.columns, row, strict=True)] for row in rows]
    labels = torch.tensor(values, dtype=torch.float32, device=device).reshape(len(rows), len(prior.columns))
    y = [prior.draw(n[None], label[None], gaussian) for n, label in zip(noise, labels, strict=True)]
    return SemanticDraws(torch.cat(y), labels, table)
