"""Columns of the table that the prior is conditioned on: numbers and categories, either of which may be missing.

As a tensor, the labels of B scans are (B, C) float32, one column each: a number itself, or the position of a category
in `Column.categories`; NaN is missing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldae.data.table import PATHS
from ldae.utils.errors import UserError

MAX_CATEGORIES = 12  # a column with more distinct texts names scans rather than groups of them
NOT_CONDITIONS = {"subject", "session", "split", *PATHS}


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        name: as in the table.
        categories: its values in training scans, sorted; None if they are numbers.
    """

    name: str
    categories: tuple[str, ...] | None = None

    def encode(self, value: object) -> float:
        """A value as the number that stands for it in a tensor; NaN if it is missing or not among the categories."""
        if self.categories is None:
            try:
                return float(value)
            except (TypeError, ValueError):
                return float("nan")
        text = _as_text(value)
        return float(self.categories.index(text)) if text in self.categories else float("nan")

    def decode(self, number: float) -> str | float:
        """The value in the table of a number in a tensor; an empty text if it is NaN."""
        if np.isnan(number):
            return ""
        return float(f"{number:.6g}") if self.categories is None else self.categories[int(number)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, from which `read_columns` makes it again."""
        return {"name": self.name, "categories": None if self.categories is None else list(self.categories)}


def read_columns(stored: Sequence[Mapping[str, Any]]) -> tuple[Column, ...]:
    """Columns out of what `Column.to_dict` gave."""
    return tuple(
        Column(str(entry["name"]), None if (names := entry["categories"]) is None else tuple(map(str, names)))
        for entry in stored
    )


def find_columns(table: pd.DataFrame, names: Sequence[str]) -> tuple[Column, ...]:
    """The columns `names` with their values in a table of training scans.

    Raises:
        UserError: a column is missing, or cannot be a condition.
    """
    usable = ", ".join(str(name) for name in table.columns if name not in NOT_CONDITIONS)
    for name in names:
        if name not in table or name in NOT_CONDITIONS:
            raise UserError(f"stage.columns: '{name}' is no column that describes a scan; the table has {usable}")
    if len(set(names)) < len(names):
        raise UserError(f"stage.columns: {', '.join(names)} names a column twice")
    return tuple(_find_column(table[name], name) for name in names)


def encode_table(columns: Sequence[Column], table: pd.DataFrame) -> Tensor:
    """Labels of the rows of a table, (N, C) float32."""
    values = [[column.encode(value) for value in table[column.name]] for column in columns]
    return torch.tensor(values, dtype=torch.float32).reshape(len(columns), len(table)).T.contiguous()


def parse_conditions(columns: Sequence[Column], ends: Tensor, conditions: Mapping[str, object]) -> Tensor:
    """What is asked for, such as {"diagnosis": "AD", "age": 75}, as labels (C,); NaN where nothing is asked.

    Args:
        ends: (C, 2), the smallest and largest number of each column in the training scans.

    Raises:
        UserError: names the column or value that the prior does not know, and those that it does.
    """
    index_of = {column.name: index for index, column in enumerate(columns)}
    wanted = torch.full((len(columns),), torch.nan)
    for name, value in conditions.items():
        if name not in index_of:
            known = ", ".join(index_of) or "none: train it with stage.columns=[diagnosis,age]"
            raise UserError(f"where {name}={value}: the prior has no column '{name}'; it has {known}")
        index = index_of[name]
        column, (low, high) = columns[index], ends[index].tolist()
        number = column.encode(value)
        if np.isnan(number) or (column.categories is None and not low <= number <= high):
            allowed = f"from {low:.4g} to {high:.4g}" if column.categories is None else " or ".join(column.categories)
            raise UserError(f"where {name}={value}: {name} of the training scans is {allowed}")
        wanted[index] = number
    return wanted


def _find_column(values: pd.Series, name: str) -> Column:
    numbers = pd.to_numeric(values, errors="coerce")
    known = values[values.map(_as_text) != ""]
    if known.empty:
        raise UserError(f"stage.columns: '{name}' is empty in all training scans")
    if numbers[known.index].notna().all():
        finite = numbers[known.index].to_numpy(np.float64)
        if not np.isfinite(finite).all() or finite.min() == finite.max():
            raise UserError(f"stage.columns: '{name}' is the same number in all training scans, or infinite")
        return Column(name)
    categories = tuple(sorted({_as_text(value) for value in known}))
    if not 2 <= len(categories) <= MAX_CATEGORIES:
        raise UserError(
            f"stage.columns: '{name}' has {len(categories)} different values in the training scans; "
            f"a column of categories has 2 to {MAX_CATEGORIES}"
        )
    return Column(name, categories)


def _as_text(value: object) -> str:
    return "" if value is None or (isinstance(value, float) and np.isnan(value)) else str(value).strip()
