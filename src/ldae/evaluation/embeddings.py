"""y of every scan, computed once: `embeddings.csv` (subject, session, split, y000, y001, ...) and its key beside it.

The key holds the hash of the encoder's weights and that of the rows; a table computed with the same two is reused.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor

from ldae.data.sharing import work_order
from ldae.evaluation.context import iterate_batches
from ldae.utils.files import read_json, replacing, write_json

log = logging.getLogger(__name__)


def embed_rows(
    embed: Callable[[Tensor], Tensor],
    volumes: Callable[[Sequence[int]], Tensor],
    count: int,
    batch_size: int = 8,
    progress: bool = True,
    parts: Path | None = None,
) -> np.ndarray:
    """Embed scans 0 to count - 1 in batches; (count, dim) float32. `embed` maps (B, 1, X, Y, Z) to (B, dim).

    Args:
        parts: a folder in which `embed_parts` has left batches; those that are missing there are computed.
    """
    from tqdm import tqdm

    found = []
    for number, rows in enumerate(tqdm(list(iterate_batches(range(count), batch_size)), "embed", disable=not progress)):
        part = None if parts is None else _part(parts, number)
        stored = part is not None and part.exists()
        found.append(np.load(part, allow_pickle=False) if stored else _embedded(embed, volumes(rows)))
    return np.concatenate(found).astype(np.float32)


def embed_parts(
    embed: Callable[[Tensor], Tensor],
    volumes: Callable[[Sequence[int]], Tensor],
    count: int,
    batch_size: int,
    parts: Path,
    accelerator: Accelerator,
) -> None:
    """Embed in several processes, which all call this: every batch as a file of `parts`, whoever computes it.

    Nobody waits while others work, and what a killed run has left is used. Batches are cut before they are dealt out:
    in a batch of other company, sums round differently.
    """
    from tqdm import tqdm

    chunks = list(iterate_batches(range(count), batch_size))
    order = work_order(len(chunks), accelerator.process_index, accelerator.num_processes)
    for number in tqdm(order, "embed", disable=not accelerator.is_main_process):
        path = _part(parts, int(number))
        if not path.exists():
            y = _embedded(embed, volumes(chunks[number]))
            with replacing(path) as temporary:
                np.save(temporary, y)
    accelerator.wait_for_everyone()  # the main process then removes the folder


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.npy"


def _embedded(embed: Callable[[Tensor], Tensor], x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return embed(x).float().cpu().numpy()


def parts_folder(path: Path, key: Mapping[str, str], batch_size: int) -> Path:
    """Where batches of the table `path` lie while several processes compute it: another one for every key and cut."""
    digest = hashlib.sha256(repr((sorted(key.items()), batch_size)).encode()).hexdigest()[:16]
    return path.with_name(f"{path.stem}_parts") / digest


def embeddings_key(table: pd.DataFrame, weights: str) -> dict[str, str]:
    """What an embeddings table was computed from: the encoder, by the hash of its weights, and the rows."""
    return {"weights": weights, "rows": rows_hash(table)}


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


def load_or_compute_embeddings(
    path: Path, table: pd.DataFrame, weights: str, compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """The embeddings of `table` by the encoder with hash `weights`: read when they fit, else computed and written."""
    key = embeddings_key(table, weights)
    found = read_embeddings(path, key)
    if found is not None and len(found) == len(table):
        log.info("embeddings of %d scans reused from %s", len(found), path)
        return found
    embeddings = compute()
    write_embeddings(path, table, embeddings, key)
    shutil.rmtree(path.with_name(f"{path.stem}_parts"), ignore_errors=True)
    return embeddings
