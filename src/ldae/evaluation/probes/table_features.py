"""Features that are read from the table of scans: age, sex and region volumes."""

import numpy as np
import pandas as pd

VOLUME, HEAD = "_mm3", "head_mm3"
SEXES = {"M": 1.0, "MALE": 1.0, "F": 0.0, "FEMALE": 0.0}
SHOWN_VALUES = 6  # values of a column that a message shows


def read_table_features(
    table: pd.DataFrame, name: str, columns: list[str] | None = None
) -> tuple[list[str], np.ndarray]:
    """Column names and values (N, D) of `age_sex` or `volumes`; D = 0 if the table has no region volumes.

    Args:
        columns: exactly the columns to read, those of a frozen predictor; missing ones are NaN. None: age and sex, or
            all region volumes that there are.
    """
    if name == "age_sex":
        columns = columns or ["age", "sex"]
    wanted = columns or find_volume_columns(table)
    found = {column: read_numbers(table, column) for column in wanted}
    kept = wanted if columns else [column for column in wanted if np.isfinite(found[column]).any()]
    values = [found[column] / found[HEAD] if _is_relative(column, kept) else found[column] for column in kept]
    return kept, np.stack(values, 1) if values else np.zeros((len(table), 0))


def find_volume_columns(table: pd.DataFrame) -> list[str]:
    """The region volumes of a table, then the head's; empty if the table has no region."""
    regions = sorted(str(column) for column in table if str(column).endswith(VOLUME) and column != HEAD)
    return [*regions, HEAD] if regions else []


def _is_relative(column: str, columns: list[str]) -> bool:
    """Whether a column is a region volume to be divided by the head's."""
    return HEAD in columns and column != HEAD and column.endswith(VOLUME)


def read_numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column as (N,) float64, sex as 1 for M and 0 for F; NaN where a value, or the whole column, is missing."""
    if column not in table:
        return np.full(len(table), np.nan)
    if column == "sex":
        words = table[column].astype(str).str.strip().str.upper()
        return words.map(SEXES).to_numpy(np.float64)
    return pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64)


def find_given(table: pd.DataFrame, column: str) -> np.ndarray:
    """Whether each row has any value in a column, (N,) bool; False if there is no such column."""
    if column not in table:
        return np.zeros(len(table), dtype=bool)
    return (table[column].notna() & (table[column].astype(str).str.strip() != "")).to_numpy()


def describe_values(table: pd.DataFrame, column: str) -> str:
    """The most frequent values of a column with their counts, for messages."""
    if column not in table:
        return f"the table has no column '{column}', only {', '.join(str(name) for name in table)}"
    counts = table[column].astype(str).where(find_given(table, column), "(empty)").value_counts()
    shown = ", ".join(f"{value} ({number})" for value, number in counts.head(SHOWN_VALUES).items())
    more = f" and {len(counts) - SHOWN_VALUES} other values" if len(counts) > SHOWN_VALUES else ""
    return f"the column '{column}' has {shown}{more}"
