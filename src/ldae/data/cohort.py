"""A cohort ready for work: table, split and cached volumes, with bad scans set aside."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from ldae.data.augmentation import Augmentation
from ldae.data.splits import hash_split, load_or_draw_split, read_split, refuse_empty_split
from ldae.data.table import read_table, write_table
from ldae.data.transforms import Transform
from ldae.data.volumes import VolumeCache, Volumes
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

SHOWN = 20  # bad scans that are named on the console; rejected.csv has them all
REJECTED = ("subject", "session", "path", "reason")
ON_BAD_SCAN = ("reject", "stop")


@dataclass(frozen=True)
class Cohort:
    """Usable scans. Row i of `table` is volume i."""

    table: pd.DataFrame
    rejected: pd.DataFrame  # subject, session, path, reason
    volumes: Volumes
    transform: Transform
    split_hash: str  # of everyone in the split file: filters and bad scans do not change it
    augmentation: Augmentation

    def __len__(self) -> int:
        return len(self.table)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split, int64."""
        return np.flatnonzero((self.table["split"] == split).to_numpy())

    def draw_augmentation(self, seed: int, keys: Sequence[int]) -> dict[str, Tensor]:
        """How B samples are to be augmented, by name in the batch, on the CPU; empty where augmentation is off."""
        return {} if self.augmentation.is_off else self.augmentation.draw(seed, keys, self.transform.shape)

    def augment(self, x: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """`x`, (B, 1, X, Y, Z), changed as was drawn into `batch`, on its device; `x` itself where nothing was."""
        return self.augmentation.apply(x, batch)

    def write_rejected(self, path: Path | str) -> None:
        """Write which scans were set aside and why; a header alone where none was."""
        write_table(self.rejected, path)


def load_cohort(
    table: Path | str,
    split_file: Path | None,
    transform: Transform,
    cache: Path | str,
    shares: Mapping[str, float],
    seed: int = 0,
    on_bad_scan: str = "reject",
    diagnoses: Sequence[str] | None = None,
    augmentation: Augmentation | None = None,
    workers: int | None = None,
    cache_dtype: str = "float16",
    progress: bool = True,
    fold: tuple[int, int] | None = None,
    share: tuple[int, int] = (0, 1),
    turn: AbstractContextManager[None] | None = None,
) -> Cohort:
    """Read the table, give it its split, transform and cache its scans.

    The split is drawn over the whole table, before diagnoses are chosen and bad scans are set aside: all stages hold
    out the same subjects, whatever they train on.

    Args:
        table: the CSV, see `read_table`.
        split_file: where the split is stored, once; None keeps none.
        cache: folder of cached volumes.
        shares: fractions of subjects by split.
        on_bad_scan: "reject" sets bad scans aside, "stop" refuses the table.
        diagnoses: keep scans with these alone; None keeps all.
        workers: processes that transform scans.
        fold: (which, of how many) is the test split, see `ensure`.
        share: this process and how many there are that load the same cohort at once, see `VolumeCache.build`.
        turn: entered while the split is drawn and stored, which one of several processes must do before the others.

    Raises:
        UserError: a fault of the table or the split, no scan left in a split, or a bad scan under "stop".
    """
    if on_bad_scan not in ON_BAD_SCAN:
        raise UserError(f"data.on_bad_scan={on_bad_scan}: one of {', '.join(ON_BAD_SCAN)} is needed")
    store = VolumeCache(cache, transform, cache_dtype)
    rows = read_table(table)
    with turn or nullcontext():
        rows = load_or_draw_split(rows, split_file, shares, seed, fold)
    stored = read_split(split_file) if split_file is not None else rows
    if diagnoses is not None:
        rows = _choose(rows, diagnoses, table)
        refuse_empty_split(rows, shares, f"what data.diagnoses leaves of {table}")
    bad = store.build(rows["path"], workers, progress, share)
    rows, rejected = _set_aside(rows, bad, on_bad_scan)
    refuse_empty_split(rows, shares, f"what the {len(rejected)} bad scans leave of {table}")
    volumes = store.open(rows["path"].tolist())
    return Cohort(rows, rejected, volumes, transform, hash_split(stored), augmentation or Augmentation())


def _choose(rows: pd.DataFrame, diagnoses: Sequence[str], table: Path | str) -> pd.DataFrame:
    wanted = [str(name) for name in diagnoses]
    present = set(rows["diagnosis"]) - {""}
    known = ", ".join(sorted(present)) or "none"
    for name in wanted:
        if name not in present:
            log.warning("data.diagnoses: no scan of %s is %s; it has %s", table, name, known)
    chosen = rows[rows["diagnosis"].isin(wanted)].reset_index(drop=True)
    if chosen.empty:
        raise UserError(f"{table}, column 'diagnosis': none of {', '.join(wanted)}; it has {known}")
    return chosen


def _set_aside(rows: pd.DataFrame, bad: Mapping[str, str], on_bad_scan: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Usable rows, and the others with the reason."""
    is_bad = rows["path"].isin(list(bad))
    rejected = rows[is_bad].reset_index(drop=True)
    rejected = rejected.assign(reason=[bad[path] for path in rejected["path"]])[list(REJECTED)]
    lines = [f"{row.path} (subject {row.subject}, {row.session}): {row.reason}" for row in rejected.itertuples()]
    if lines and on_bad_scan == "stop":
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise UserError(f"bad scan {lines[0]}{more}; data.on_bad_scan=reject sets such scans aside")
    for line in lines[:SHOWN]:
        log.warning("set aside: %s", line)
    if len(lines) > SHOWN:
        log.warning("set aside: %d more", len(lines) - SHOWN)
    return rows[~is_bad].reset_index(drop=True), rejected
