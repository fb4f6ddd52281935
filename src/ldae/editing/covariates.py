"""Columns of the table as numbers, for predictors that read them beside y.

A number is standardised, a category becomes one indicator for each of its values, less the share of it. A missing value
is 0 in both, which is the mean of the training scans.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ldae.utils.errors import UserError

MAX_CATEGORIES = 20  # a column of text with more values, such as names of scans, says nothing about others


@dataclass(frozen=True)
class Covariate:
    """One column.

    Attributes:
        column: its name.
        mean, std: of a number in the training scans.
        categories: values of a category; empty for a number.
        shares: of each category in the training scans.
    """

    column: str
    mean: float = 0.0
    std: float = 1.0
    categories: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()

    @classmethod
    def fit(cls, column: str, values: pd.Series) -> "Covariate | None":
        """Measure a column of the training scans; None if it has fewer than two values, or too many categories."""
        numbers = pd.to_numeric(values, errors="coerce")
        present = values.notna() & (values.astype(str) != "")
        if numbers.notna().any():
            std = float(numbers.std(ddof=0))
            return cls(column, float(numbers.mean()), std) if std > 0 else None
        shares = values[present].astype(str).value_counts(normalize=True).sort_index()
        if not 2 <= len(shares) <= MAX_CATEGORIES:
            return None
        return cls(column, categories=tuple(shares.index), shares=tuple(float(share) for share in shares))

    @property
    def width(self) -> int:
        """The number of features."""
        return len(self.categories) or 1

    def encode(self, values: pd.Series) -> np.ndarray:
        """Features (N, width) of a column (N,)."""
        if not self.categories:
            numbers = pd.to_numeric(values, errors="coerce").to_numpy(np.float64)
            return np.nan_to_num((numbers - self.mean) / self.std)[:, None]
        text = values.astype(str).to_numpy()
        found = np.stack([(text == name).astype(np.float64) for name in self.categories], 1)
        known = found.any(1, keepdims=True)
        return np.where(known, found - np.asarray(self.shares), 0.0)

    def parse(self, text: str) -> float | str:
        """A value that a user gives.

        Raises:
            UserError: it is no number, or none of the categories.
        """
        if self.categories:
            if text not in self.categories:
                raise UserError(f"{self.column}={text}: this model knows {', '.join(self.categories)}")
            return text
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not np.isfinite(value):
            raise UserError(f"{self.column}={text}: give a number, such as {self.mean:.3g}")
        return value

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**vars(self), "categories": list(self.categories), "shares": list(self.shares)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "Covariate":
        """The inverse of `to_dict`."""
        categories, shares = tuple(map(str, value["categories"])), tuple(map(float, value["shares"]))
        return cls(str(value["column"]), float(value["mean"]), float(value["std"]), categories, shares)
