"""The embedding y of every scan, computed once and stored as `embeddings.csv` (subject, session, split, y000, ...).

`embeddings.json` contains its key: the hash of the encoder's weights, that of the rows, and that of the versions of the
scans (ldae.data.file_version). A stored table is reused if its key is the present one.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from torch import Tensor

from ldae.data.cohort import Cohort
from ldae.data.file_version import FileVersion
from ldae.data.sharing import work_order
from ldae.data.table import PATHS
from ldae.evaluation.context import iterate_batches
from ldae.utils.files import read_json, replacing, write_json

log = logging.getLogger(__name__)

EncoderFn = Callable[[Tensor], Tensor]  # views (B, C, X, Y, Z) -> y (B, dim)


def embed_cohort(path: Path, weights: str, encoder: EncoderFn, cohort: Cohort, batch_size: int) -> np.ndarray:
    """Embeddings of every scan, (N, dim) float32: read from `path` if they are there, otherwise computed and stored.

    Args:
        weights: identifies the encoder, see `embeddings_key`.
    """
    key = cohort_key(path, weights, cohort)
    parts = parts_folder(path, key, batch_size)
    return load_or_compute_embeddings(
        path, cohort.table, key, lambda: embed_rows(encoder, cohort.views.batch, len(cohort), batch_size, parts)
    )


def embed_cohort_in_all_processes(
    path: Path, weights: str, encoder: EncoderFn, cohort: Cohort, batch_size: int, accelerator: Accelerator
) -> None:
    """Compute in all processes what `embed_cohort` in the main process then only has to collect. All call this."""
    key = cohort_key(path, weights, cohort)
    if read_embeddings(path, key) is None:
        parts = parts_folder(path, key, batch_size)
        embed_parts(encoder, cohort.views.batch, len(cohort), batch_size, parts, accelerator)


def embed_rows(
    encoder: EncoderFn,
    views: Callable[[Sequence[int]], Tensor],
    count: int,
    batch_size: int = 8,
    parts: Path | None = None,
) -> np.ndarray:
    """Embed scans 0 to count - 1 in batches, (count, dim) float32.

    Args:
        views: reads what the encoder sees of the scans of some rows.
        parts: folder in which `embed_parts` has left batches; only the batches missing there are computed.
    """
    from tqdm import tqdm

    found = []
    for number, rows in enumerate(tqdm(list(iterate_batches(range(count), batch_size)), "embed")):
        part = None if parts is None else _part_file(parts, number)
        is_stored = part is not None and part.exists()
        found.append(np.load(part, allow_pickle=False) if is_stored else _embed(encoder, views(rows)))
    return np.concatenate(found).astype(np.float32)


def embed_parts(
    encoder: EncoderFn,
    views: Callable[[Sequence[int]], Tensor],
    count: int,
    batch_size: int,
    parts: Path,
    accelerator: Accelerator,
) -> None:
    """Embed in several processes, all of which call this. Each batch becomes one file in the folder `parts`.

    No process waits for another before the end, and batches that an interrupted run has left are reused. Batches are
    formed before they are distributed, because sums round differently in a batch of other scans.
    """
    from tqdm import tqdm

    chunks = list(iterate_batches(range(count), batch_size))
    order = work_order(len(chunks), accelerator.process_index, accelerator.num_processes)
    for number in tqdm(order, "embed", disable=not accelerator.is_main_process):
        path = _part_file(parts, int(number))
        if not path.exists():
            y = _embed(encoder, views(chunks[number]))
            with replacing(path) as temporary:
                np.save(temporary, y)
    accelerator.wait_for_everyone()  # only then may the main process remove the folder


def _part_file(parts: Path, number: int) -> Path:
    return parts / f"{number:06d}.npy"


def _embed(encoder: EncoderFn, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return encoder(x).float().cpu().numpy()


def parts_folder(path: Path, key: Mapping[str, str], batch_size: int) -> Path:
    """Folder for the batches of the table `path` while several processes compute it; one per key and batch size."""
    digest = hashlib.sha256(repr((sorted(key.items()), batch_size)).encode()).hexdigest()[:16]
    return path.with_name(f"{path.stem}_parts") / digest


def embeddings_key(table: pd.DataFrame, weights: str, scans: str = "") -> dict[str, str]:
    """What a table of embeddings was computed from.

    Args:
        weights: identifies the encoder, such as the hash of its weights.
        scans: hash of the versions of the scans; empty if they are not known.
    """
    return {"weights": weights, "rows": rows_hash(table), **({"scans": scans} if scans else {})}


def cohort_key(path: Path, weights: str, cohort: Cohort) -> dict[str, str]:
    """The key of the embeddings of a cohort.

    Embeddings that an earlier version of this project stored at `path`, without the versions of the scans, keep their
    key as long as no scan has changed since they were written.
    """
    key = embeddings_key(cohort.table, weights, hashlib.sha256(cohort.digest_views().tobytes()).hexdigest())
    former = {name: key[name] for name in ("weights", "rows")}
    if read_embeddings(path, former) is None:
        return key
    written = path.stat().st_mtime_ns
    unchanged = all(os.stat(scan).st_ctime_ns < written for scan in cohort.table["path"])
    return former if unchanged else key


def hash_cohort(cohort: Cohort) -> str:
    """SHA-256 of the values of a cohort's table and of the versions of its scans, their views and label maps."""
    table = cohort.table
    digest = hashlib.sha256(table.drop(columns=[name for name in PATHS if name in table]).to_csv(index=False).encode())
    digest.update(cohort.digest_scans().tobytes())
    if cohort.view_key is not None:
        digest.update(cohort.digest_views().tobytes())
    for path in table.get("labels_path", ()):
        if isinstance(path, str) and os.path.isfile(path):
            digest.update(repr(FileVersion.of(path).identity).encode())
    return digest.hexdigest()


def rows_hash(table: pd.DataFrame) -> str:
    """SHA-256 over subject, session and path of every row, in order."""
    rows = table[["subject", "session", "path"]].astype(str).agg("\t".join, axis=1)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def write_embeddings(path: Path, table: pd.DataFrame, embeddings: np.ndarray, key: dict[str, str]) -> None:
    """Write the table, then its key. Nine digits suffice to read back the same float32."""
    names = [f"y{index:03d}" for index in range(embeddings.shape[1])]
    values = pd.DataFrame(embeddings, columns=names, index=table.index)
    key_path(path).unlink(missing_ok=True)  # a new table must never be found with an old key
    with replacing(path) as temporary:
        pd.concat([table[["subject", "session", "split"]], values], axis=1).to_csv(
            temporary, index=False, float_format="%.9g"
        )
    write_json(key_path(path), key)


def read_embeddings(path: Path, key: dict[str, str]) -> np.ndarray | None:
    """The embeddings stored at `path`, (N, dim) float32, if they were computed under the same key; otherwise None."""
    if not (path.exists() and key_path(path).exists()) or read_json(key_path(path)) != key:
        return None
    table = pd.read_csv(path, dtype={"subject": str, "session": str}, float_precision="round_trip")
    return table.filter(regex=r"^y\d+$").to_numpy(np.float32)


def key_path(path: Path) -> Path:
    """The file that holds the key of the table `path`."""
    return path.with_suffix(".json")


def load_or_compute_embeddings(
    path: Path, table: pd.DataFrame, key: dict[str, str], compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """The embeddings of `table`: read if those at `path` were stored under `key`, otherwise computed and stored."""
    found = read_embeddings(path, key)
    if found is not None and len(found) == len(table):
        log.info("embeddings of %d scans are reused from %s", len(found), path)
        return found
    embeddings = compute()
    write_embeddings(path, table, embeddings, key)
    shutil.rmtree(path.with_name(f"{path.stem}_parts"), ignore_errors=True)
    return embeddings
