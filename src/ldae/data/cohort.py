"""A cohort that is ready for use: its table with the split, its cached volumes, and the scans that were rejected."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor

from ldae.data.augmentation import Augmentation
from ldae.data.latent_file import digest_each
from ldae.data.splits import Split, add_split, hash_split, plan_split, refuse_empty_split
from ldae.data.table import read_table, write_table
from ldae.data.transforms import Transform
from ldae.data.view import View
from ldae.data.volumes import VolumeCache, Volumes
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

SHOWN = 20  # rejected scans that are named on the console; rejected.csv lists all of them
REJECTED = ("subject", "session", "path", "reason")
ON_BAD_SCAN = ("reject", "stop")


@dataclass(frozen=True)
class Cohort:
    """The usable scans of a table.

    Attributes:
        table: one row per scan.
        rejected: subject, session, path and reason of each scan that cannot be used.
        volumes: volume i is the scan of row i.
        transform: what brought the scans to model space.
        split_hash: of all subjects in the stored split, so that neither filters nor rejected scans change it.
        augmentation: random changes of training volumes.
        split: the split of all subjects, which is stored once the cohort is accepted.
        view: what the semantic encoder sees of a scan; None: the volumes.
        stored_views: the views of the scans of all rows; None if they are the volumes or were not asked for.
    """

    table: pd.DataFrame
    rejected: pd.DataFrame
    volumes: Volumes
    transform: Transform
    split_hash: str
    augmentation: Augmentation
    split: Split = field(default_factory=lambda: Split({}))
    view: View | None = None
    stored_views: Volumes | None = None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def view_key(self) -> str | None:
        """Identity of what the semantic encoder sees; None if these are the volumes."""
        return None if self.view is None or self.view.is_volume(self.transform) else self.view.key()

    @property
    def views(self) -> Volumes:
        """What the semantic encoder sees of each scan; view i is of the scan of row i."""
        if self.view_key is None:
            return self.volumes
        if self.stored_views is None:
            raise RuntimeError("this cohort was loaded without views")
        return self.stored_views

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of a split, int64."""
        return np.flatnonzero((self.table["split"] == split).to_numpy())

    def accepts_split(self, split_hash: str) -> bool:
        """Whether a model that was trained with the split of that hash has seen no test subject of this cohort."""
        return split_hash in (self.split_hash, *self.split.earlier)

    def digest_scans(self, precision: str = "no") -> np.ndarray:
        """Digest of the version of each scan and of how it is brought to model space, (N, 16) uint8.

        The path is left out, so that a folder of scans can be moved: whatever is stored with a digest also names the
        subject and the session.

        Args:
            precision: of the networks that read the volumes, as Accelerate names it; another one changes the last
                digits of their results.
        """
        how = (self.transform.key(), self.volumes.stored_maximum, *([] if precision == "no" else [precision]))
        return digest_each(repr((*scan.identity, *how)).encode() for scan in self.volumes.versions)

    def digest_views(self) -> np.ndarray:
        """Digest of the version of each scan and of how its view is made, (N, 16) uint8, as in `digest_scans`."""
        if self.view_key is None:
            return self.digest_scans()
        how = (self.view_key, self.views.stored_maximum)
        return digest_each(repr((*scan.identity, *how)).encode() for scan in self.views.versions)

    def draw_augmentation(self, seed: int, keys: Sequence[int]) -> dict[str, Tensor]:
        """Random augmentation of B samples, by name in the batch, on the CPU; empty where augmentation is off."""
        return {} if self.augmentation.is_off else self.augmentation.draw(seed, keys, self.transform.shape)

    def draw_view_augmentation(self, seed: int, keys: Sequence[int]) -> dict[str, Tensor]:
        """The same for views, whose contrast and brightness are changed only if they are intensities."""
        if self.augmentation.is_off:
            return {}
        augmentation = self.augmentation
        if self.view is not None and not self.view.has_intensities:
            augmentation = replace(augmentation, shift=0.0, contrast=0.0)
        return augmentation.draw(seed, keys, self.transform.shape if self.view is None else self.view.shape)

    def augment(self, x: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Change volumes or views (B, C, X, Y, Z) as was drawn into `batch`, on their device; `x` if nothing was."""
        return self.augmentation.apply(x, batch)

    def write_rejected(self, path: Path | str) -> None:
        """Write the rejected scans and the reasons as CSV; only a header if there are none."""
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
    extend: bool = False,
    share: tuple[int, int] = (0, 1),
    view: View | None = None,
) -> Cohort:
    """Read a table, add its split, and transform the scans that are not in the cache yet.

    The split is drawn over the whole table, before scans are selected by diagnosis and before unusable ones are
    rejected: all stages hold out the same subjects, whichever scans they train on.

    Args:
        table: the CSV file, see `read_table`.
        split_file: where the split is stored; None draws it without storing it. It is not written here: whoever
            accepts the cohort calls `cohort.split.store`.
        cache: folder of all caches.
        shares: fractions of subjects by split.
        on_bad_scan: "reject" continues without scans that cannot be used, "stop" raises.
        diagnoses: keep only scans with one of these; None keeps all.
        workers: processes that transform scans.
        fold: number of the fold that is the test split, and number of folds; see `plan_split`.
        extend: whether subjects that the stored split does not name are drawn into it.
        share: number of this process, and number of processes that load the cohort; see `VolumeCache.build`.
        view: what the semantic encoder sees of a scan; None: the volumes. Scans without a view are rejected.

    Raises:
        UserError: the table or the split is faulty, a split has no scan left, or a scan cannot be used under "stop".
    """
    if on_bad_scan not in ON_BAD_SCAN:
        raise UserError(f"data.on_bad_scan={on_bad_scan}: one of {', '.join(ON_BAD_SCAN)} is needed")
    store = VolumeCache(cache, transform, cache_dtype)
    rows = read_table(table)
    split = plan_split(rows, split_file, shares, seed, fold, extend)
    rows = add_split(rows, split.of_subject)
    if diagnoses is not None:
        rows = _select_diagnoses(rows, diagnoses, table)
        refuse_empty_split(rows, shares, f"what data.diagnoses leaves of {table}")
    volumes, reasons = store.build(rows["path"], workers, progress, share)
    views = None
    if view is not None and not view.is_volume(transform):
        views, unseen = VolumeCache(cache, view, cache_dtype).build(volumes.scans, workers, progress, share)
        reasons, volumes = {**reasons, **unseen}, volumes.of_scans(views.scans)
    rows, rejected = _reject(rows, reasons, on_bad_scan)
    refuse_empty_split(rows, shares, f"what the {len(rejected)} rejected scans leave of {table}")
    whole, augmentation = hash_split(split.of_subject), augmentation or Augmentation()
    return Cohort(rows, rejected, volumes, transform, whole, augmentation, split, view, views)


def _select_diagnoses(rows: pd.DataFrame, diagnoses: Sequence[str], table: Path | str) -> pd.DataFrame:
    wanted = [str(name) for name in diagnoses]
    present = set(rows["diagnosis"]) - {""}
    known = ", ".join(sorted(present)) or "none"
    for name in wanted:
        if name not in present:
            log.warning("data.diagnoses: %s has no scan with %s, only with %s", table, name, known)
    chosen = rows[rows["diagnosis"].isin(wanted)].reset_index(drop=True)
    if chosen.empty:
        raise UserError(f"{table}, column 'diagnosis': none of {', '.join(wanted)}; it has {known}")
    return chosen


def _reject(rows: pd.DataFrame, reasons: Mapping[str, str], on_bad_scan: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The usable rows, and the others with the reason, which is logged."""
    is_bad = rows["path"].isin(list(reasons))
    rejected = rows[is_bad].reset_index(drop=True)
    rejected = rejected.assign(reason=[reasons[path] for path in rejected["path"]])[list(REJECTED)]
    lines = [f"{row.path} (subject {row.subject}, {row.session}): {row.reason}" for row in rejected.itertuples()]
    if lines and on_bad_scan == "stop":
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise UserError(f"bad scan {lines[0]}{more}; data.on_bad_scan=reject continues without such scans")
    for line in lines[:SHOWN]:
        log.warning("rejected: %s", line)
    if len(lines) > SHOWN:
        log.warning("rejected: %d more", len(lines) - SHOWN)
    return rows[~is_bad].reset_index(drop=True), rejected
