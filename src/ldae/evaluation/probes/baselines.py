"""The features of each predictor: our embedding, and what it has to beat under the same protocol.

`mean` no features (always the mean, always the majority); `age_sex` age and sex; `pca` the autoencoder's latents, and
`images` the scans at about 4 mm, both reduced by PCA inside the pipeline; `untrained` the same semantic encoder with
its initial random weights; `volumes` the region volumes that the table has (columns *_mm3), as shares of the head's
where it has that too (`head_mm3`, which stays a feature).
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
    """Column names and (N, D) values of `age_sex` or `volumes`; D = 0 when the table has none of them.

    `columns` asks for exactly these (a frozen predictor's); one that the table lacks is NaN. Sex is 1 for M, 0 for F.
    """
    wanted = columns or (["age", "sex"] if name == "age_sex" else find_volume_columns(table))
    found = {column: read_numbers(table, column) for column in wanted}
    kept = wanted if columns else [column for column in wanted if np.isfinite(found[column]).any()]
    values = [found[column] / found[HEAD] if _by_head(column, kept) else found[column] for column in kept]
    return kept, np.stack(values, 1) if values else np.zeros((len(table), 0))


def find_volume_columns(table: pd.DataFrame) -> list[str]:
    """The region volumes of a table, and the head's behind them; none where there is no region."""
    regions = sorted(str(column) for column in table if str(column).endswith(VOLUME) and column != HEAD)
    return [*regions, HEAD] if regions else []


def _by_head(column: str, columns: list[str]) -> bool:
    return HEAD in columns and column != HEAD and column.endswith(VOLUME)


def read_numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column as (N,) float64, sex as 1 for M and 0 for F; NaN where missing, all NaN without such a column."""
    if column not in table:
        return np.full(len(table), np.nan)
    if column == "sex":
        letters = table[column].astype(str).str.upper().str[:1]
        return letters.map({"M": 1.0, "F": 0.0}).to_numpy(np.float64)
    return pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64)


def flatten_latents(context: Context, batch_size: int = 32) -> np.ndarray:
    """Posterior means of all scans, flattened: (N, C x y z) float32."""
    parts = [
        context.posterior(rows)[0].flatten(1).numpy() for rows in iterate_batches(range(len(context.table)), batch_size)
    ]
    return np.concatenate(parts).astype(np.float32)


def downsample_scans(context: Context, batch_size: int = 8) -> np.ndarray:
    """All scans averaged to voxels of about IMAGES_MM, flattened: (N, x y z) float32."""
    from torch.nn.functional import avg_pool3d

    size = [max(1, round(IMAGES_MM / spacing)) for spacing in context.spacing]
    rows = range(len(context.table))
    parts = [
        avg_pool3d(context.volumes(part).float(), size).flatten(1).numpy() for part in iterate_batches(rows, batch_size)
    ]
    return np.concatenate(parts)


class Features:
    """The features of a context by predictor name, each computed at most once."""

    def __init__(self, context: Context):
        self._table = context.table
        self._make: dict[str, Callable[[], np.ndarray]] = {
            "embedding": lambda: context.embeddings,
            "mean": lambda: np.zeros((len(context.table), 0)),
            "pca": lambda: flatten_latents(context),
            "images": lambda: downsample_scans(context),
            "untrained": lambda: context.untrained(),
        }
        self._made: dict[str, np.ndarray] = {}

    def __call__(self, name: str, columns: list[str] | None = None) -> tuple[list[str], np.ndarray]:
        """Names of the table's columns used (empty for the others) and values, (N, D)."""
        if name not in self._make:
            return read_table_features(self._table, name, columns)
        if name not in self._made:
            self._made[name] = self._make[name]()
        return [], self._made[name]

    def select_applicable(self, names: Sequence[str], target: str) -> list[str]:
        """Those baselines that make sense for the column `target`; the log says of the others why not."""
        kept = []
        for name in names:
            why = self._skips(name, target)
            if why:
                log.info("baseline %s is left out for %s: %s", name, target, why)
            else:
                kept.append(name)
        return kept

    def _skips(self, name: str, target: str) -> str | None:
        """Why baseline `name` makes no sense for the column `target`, or None."""
        if name in self._make:
            return None
        columns, _ = self(name)
        if not columns:
            return "the table has none of its columns"
        return f"{target} is among its columns" if target in columns else None
