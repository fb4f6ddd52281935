"""Features that are read from the table of scans: age, sex and region volumes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

VOLUME, HEAD = "_mm3", "head_mm3"
HEAD_SIZE = (HEAD, "affine_determinant")  # columns that tell a head's size: its volume, the registration's scaling
TABLE_FEATURES = ("age_sex", "volumes", "volumes_head")
RATIO = "/"  # a feature "a/b" is the column a divided by the column b
SEXES = {"M": 1.0, "MALE": 1.0, "F": 0.0, "FEMALE": 0.0}
SHOWN_VALUES = 6  # values of a column that a message shows


def find_columns(table: pd.DataFrame, name: str) -> list[str]:
    """The features that `age_sex`, `volumes` or `volumes_head` reads from a table; empty if it has none of them."""
    if name == "age_sex":
        return ["age", "sex"]
    regions = find_region_columns(table)
    if name == "volumes":
        return regions
    head = find_head_columns(table)
    return [*regions, *head] if regions and head else []


def find_region_columns(table: pd.DataFrame) -> list[str]:
    """The region volumes of a table, relative to the head's volume if it has that."""
    regions = [str(column) for column in table if str(column).endswith(VOLUME) and column != HEAD]
    relative = f"{RATIO}{HEAD}" if np.isfinite(read_numbers(table, HEAD)).any() else ""
    return sorted(f"{region}{relative}" for region in regions if np.isfinite(read_numbers(table, region)).any())


def find_head_columns(table: pd.DataFrame) -> list[str]:
    """The columns that tell the size of a head."""
    return [column for column in HEAD_SIZE if np.isfinite(read_numbers(table, column)).any()]


def read_columns(table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
    """Features (N, D) by the names that `find_columns` gives, NaN where a value is missing.

    Predictors of an earlier version of this project name regions without the head's volume, which they were divided by
    if it was among their columns.
    """
    former = HEAD in columns and not any(RATIO in column for column in columns)
    divided = [f"{c}{RATIO}{HEAD}" if former and c.endswith(VOLUME) and c != HEAD else c for c in columns]
    return np.stack([read_numbers(table, column) for column in divided], 1) if divided else np.zeros((len(table), 0))


def read_numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column as (N,) float64, sex as 1 for M and 0 for F; NaN where a value, or the whole column, is missing.

    `a/b` is the quotient of two columns.
    """
    if RATIO in column and column not in table:
        first, second = (read_numbers(table, part) for part in column.split(RATIO, 1))
        return np.divide(first, second, out=np.full(len(table), np.nan), where=second != 0)
    if column not in table:
        return np.full(len(table), np.nan)
    if column == "sex":
        words = table[column].astype(str).str.strip().str.upper()
        return words.map(SEXES).to_numpy(np.float64)
    return pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64)


def find_given(table: pd.DataFrame, column: str) -> np.ndarray:
    """Whether each row has any value in a column (of a quotient: the first), (N,) bool; False without such a column."""
    column = column if column in table else column.split(RATIO)[0]
    if column not in table:
        return np.zeros(len(table), dtype=bool)
    return (table[column].notna() & (table[column].astype(str).str.strip() != "")).to_numpy()


def describe_values(table: pd.DataFrame, column: str) -> str:
    """The most frequent values of a column with their counts, for messages."""
    column = column if column in table else column.split(RATIO)[0]
    if column not in table:
        return f"the table has no column '{column}', only {', '.join(str(name) for name in table)}"
    counts = table[column].astype(str).where(find_given(table, column), "(empty)").value_counts()
    shown = ", ".join(f"{value} ({number})" for value, number in counts.head(SHOWN_VALUES).items())
    more = f" and {len(counts) - SHOWN_VALUES} other values" if len(counts) > SHOWN_VALUES else ""
    return f"the column '{column}' has {shown}{more}"
