"""y of every scan, computed once: `embeddings.csv` (subject, session, split, y000, y001, ...) and its key beside it.

The key holds the hash of the encoder's weights and that of the rows; a table computed with the same two is reused.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from ldae.evaluation.context import batches
from ldae.files import read_json, replacing, write_json

log = logging.getLogger(__name__)


def embed_rows(
    embed: Callable[[Tensor], Tensor],
    volumes: Callable[[Sequence[int]], Tensor],
    count: int,
    batch_size: int = 8,
    progress: bool = True,
    accelerator: Accelerator | None = None,
) -> np.ndarray:
    """Embed scans 0 to count - 1 in batches; (count, dim) float32. `embed` maps (B, 1, X, Y, Z) to (B, dim).

    Args:
        accelerator: of several processes, which then all call this: each takes every n-th batch, all get all. Batches
            are cut before they are dealt out: in a batch of other company, sums round differently.
    """
    from tqdm import tqdm

    chunks, several = list(enumerate(batches(range(count), batch_size))), _several(accelerator)
    if several:
        chunks = chunks[accelerator.process_index :: accelerator.num_processes]
        progress = progress and accelerator.is_main_process
    with torch.no_grad(), tqdm(chunks, "embed", disable=not progress) as bar:
        parts = [(number, embed(volumes(rows)).float().cpu().numpy()) for number, rows in bar]
    parts = gather_object(parts) if several else parts
    return np.concatenate([part for _, part in sorted(parts, key=lambda item: item[0])]).astype(np.float32)


def _several(accelerator: Accelerator | None) -> bool:
    return accelerator is not None and accelerator.num_processes > 1


def rows_hash(table: pd.DataFrame) -> str:
    """Of which scans, in which order: sha256 over (subject, session, path)."""
    rows = table[["subject", "session", "path"]].astype(str).agg("\t".join, axis=1)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def write_embeddings(path: Path, table: pd.DataFrame, embeddings: np.ndarray, key: dict[str, str]) -> None:
    """Write the table, then its key. Nine digits give back the same float32."""
    names = [f"y{index:03d}" for index in range(embeddings.shape[1])]
    values = pd.DataFrame(embeddings, columns=names, index=table.index)
    key_path(path).unlink(missing_ok=True)  # never a new table under an old key
    with replacing(path) as temporary:
        pd.concat([table[["subject", "session", "split"]], values], axis=1).to_csv(
            temporary, index=False, float_format="%.9g"
        )
    write_json(key_path(path), key)


def read_embeddings(path: Path, key: dict[str, str]) -> np.ndarray | None:
    """The embeddings at `path`, (N, dim) float32, if they were computed under the same key; otherwise None."""
    if not (path.exists() and key_path(path).exists()) or read_json(key_path(path)) != key:
        return None
    table = pd.read_csv(path, dtype={"subject": str, "session": str}, float_precision="round_trip")
    return table.filter(regex=r"^y\d+$").to_numpy(np.float32)


def key_path(path: Path) -> Path:
    """Where the key of an embeddings table lies."""
    return path.with_suffix(".json")


def cached_embeddings(
    path: Path,
    table: pd.DataFrame,
    weights: str,
    compute: Callable[[], np.ndarray],
    accelerator: Accelerator | None = None,
) -> np.ndarray:
    """The embeddings of `table` by the encoder with hash `weights`: read when they fit, else computed and written.

    Of several processes behind `accelerator`, which all call this, the main one alone reads and writes.
    """
    several = _several(accelerator)
    main = not several or accelerator.is_main_process
    key = {"weights": weights, "rows": rows_hash(table)}
    stored = [read_embeddings(path, key) if main else None]
    if several:
        broadcast_object_list(stored)
    found = stored[0]
    if found is not None and len(found) == len(table):
        log.info("embeddings of %d scans reused from %s", len(found), path)
        return found
    embeddings = compute()
    if main:
        write_embeddings(path, table, embeddings, key)
    return embeddings
