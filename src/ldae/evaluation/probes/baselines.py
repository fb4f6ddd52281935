"""The features of each predictor: the embedding, and the baselines that it is compared with under the same protocol.

mean        no features: always the mean, or always the majority class
age_sex     age and sex
pca         the autoencoder's latents, reduced by PCA
images      the scans at about 4 mm, reduced by PCA
untrained   y of the same semantic encoder with its initial random weights
volumes     the table's region volumes (columns *_mm3), relative to the head's volume if the table has it
            (`head_mm3`, which remains a feature)
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from ldae.evaluation.context import Context, iterate_batches

log = logging.getLogger(__name__)

BASELINES = ("mean", "age_sex", "pca", "untrained", "volumes")
CHOICES = (*BASELINES, "images")
REDUCED = ("pca", "images")  # by PCA
VOLUME, HEAD = "_mm3", "head_mm3"
IMAGES_MM = 4.0


def read_table_features(
    table: pd.DataFrame, name: str, columns: list[str] | None = None
) -> tuple[list[str], np.ndarray]:
    """Column names and values (N, D) of `age_sex` or `volumes`; D = 0 if the table has none of their columns.

    Args:
        columns: exactly the columns to read, those of a frozen predictor; missing ones are NaN. None: all there are.
    """
    wanted = columns or (["age", "sex"] if name == "age_sex" else find_volume_columns(table))
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
        letters = table[column].astype(str).str.upper().str[:1]
        return letters.map({"M": 1.0, "F": 0.0}).to_numpy(np.float64)
    return pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64)


def flatten_latents(context: Context, batch_size: int = 32) -> np.ndarray:
    """Posterior means of all scans, flattened: (N, C X' Y' Z') float32."""
    rows = range(len(context.table))
    parts = [context.posterior(part)[0].flatten(1).numpy() for part in iterate_batches(rows, batch_size)]
    return np.concatenate(parts).astype(np.float32)


def downsample_scans(context: Context, batch_size: int = 8) -> np.ndarray:
    """All scans averaged to voxels of about IMAGES_MM, flattened: (N, voxels) float32."""
    from torch.nn.functional import avg_pool3d

    size = [max(1, round(IMAGES_MM / spacing)) for spacing in context.spacing]
    rows = range(len(context.table))
    parts = [
        avg_pool3d(context.volumes(part).float(), size).flatten(1).numpy() for part in iterate_batches(rows, batch_size)
    ]
    return np.concatenate(parts)


class Features:
    """The features of all scans of a context by the predictor's name, each computed at most once."""

    def __init__(self, context: Context):
        self._table = context.table
        self._compute: dict[str, Callable[[], np.ndarray]] = {
            "embedding": lambda: context.embeddings,
            "mean": lambda: np.zeros((len(context.table), 0)),
            "pca": lambda: flatten_latents(context),
            "images": lambda: downsample_scans(context),
            "untrained": lambda: context.untrained(),
        }
        self._computed: dict[str, np.ndarray] = {}

    def __call__(self, name: str, columns: list[str] | None = None) -> tuple[list[str], np.ndarray]:
        """The table's columns that a predictor reads (none for some predictors), and its features, (N, D)."""
        if name not in self._compute:
            return read_table_features(self._table, name, columns)
        if name not in self._computed:
            self._computed[name] = self._compute[name]()
        return [], self._computed[name]

    def select_applicable(self, names: Sequence[str], target: str) -> list[str]:
        """The baselines that make sense for predicting the column `target`; the others are logged with the reason."""
        kept = []
        for name in names:
            reason = self._reason_inapplicable(name, target)
            if reason:
                log.info("baseline %s is not computed for %s: %s", name, target, reason)
            else:
                kept.append(name)
        return kept

    def _reason_inapplicable(self, name: str, target: str) -> str | None:
        if name in self._compute:
            return None
        columns, _ = self(name)
        if not columns:
            return "the table has none of its columns"
        return f"{target} is one of its columns" if target in columns else None
