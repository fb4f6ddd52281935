"""The features of each predictor: our embedding, and what it has to beat under the same protocol.

`mean` no features (always the mean, always the majority); `age_sex` age and sex; `pca` the autoencoder's latents,
reduced by PCA inside the pipeline; `untrained` the same semantic encoder with its initial random weights; `volumes` the
true region volumes where the table has them.
"""

import logging
from collections.abc import Callable

import numpy as np
import pandas as pd

from ldae.evaluation.context import Context, batches

log = logging.getLogger(__name__)

BASELINES = ("mean", "age_sex", "pca", "untrained", "volumes")
VOLUMES = ("ventricle_mm3", "hippocampus_mm3", "brain_mm3")


def table_features(table: pd.DataFrame, name: str, columns: list[str] | None = None) -> tuple[list[str], np.ndarray]:
    """Column names and (N, D) values of `age_sex` or `volumes`; D = 0 when the table has none of them.

    `columns` asks for exactly these (a frozen predictor's); one that the table lacks is NaN. Sex is 1 for M, 0 for F.
    """
    wanted = columns or (["age", "sex"] if name == "age_sex" else list(VOLUMES))
    found = {column: numbers(table, column) for column in wanted}
    kept = wanted if columns else [column for column in wanted if np.isfinite(found[column]).any()]
    values = [found[column] for column in kept]
    return kept, np.stack(values, 1) if values else np.zeros((len(table), 0))


def numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column as (N,) float64, sex as 1 for M and 0 for F; NaN where missing, all NaN without such a column."""
    if column not in table:
        return np.full(len(table), np.nan)
    if column == "sex":
        letters = table[column].astype(str).str.upper().str[:1]
        return letters.map({"M": 1.0, "F": 0.0}).to_numpy(np.float64)
    return pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64)


def latents(context: Context, batch_size: int = 32) -> np.ndarray:
    """Posterior means of all scans, flattened: (N, C x y z) float32."""
    parts = [context.posterior(rows)[0].flatten(1).numpy() for rows in batches(range(len(context.table)), batch_size)]
    return np.concatenate(parts).astype(np.float32)


class Features:
    """The features of a context by predictor name, each computed at most once."""

    def __init__(self, context: Context):
        self._table = context.table
        self._make: dict[str, Callable[[], np.ndarray]] = {
            "embedding": lambda: context.embeddings,
            "mean": lambda: np.zeros((len(context.table), 0)),
            "pca": lambda: latents(context),
            "untrained": lambda: context.untrained(),
        }
        self._made: dict[str, np.ndarray] = {}

    def __call__(self, name: str, columns: list[str] | None = None) -> tuple[list[str], np.ndarray]:
        """Names of the table's columns used (empty for the others) and values, (N, D)."""
        if name not in self._make:
            return table_features(self._table, name, columns)
        if name not in self._made:
            self._made[name] = self._make[name]()
        return [], self._made[name]

    def skips(self, name: str, target: str) -> str | None:
        """Why baseline `name` makes no sense for the column `target`, or None."""
        if name in self._make:
            return None
        columns, _ = self(name)
        if not columns:
            return "the table has none of its columns"
        return f"{target} is among its columns" if target in columns else None
