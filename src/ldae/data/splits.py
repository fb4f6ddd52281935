"""The split of a cohort into train, val and test by subject: drawn once, stored, and kept.

The draw depends on (seed, subject) alone: neither the order of rows nor a filter changes a subject's split. It is
stored in split.csv, so that subjects who are added later leave the others where they are.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ldae.data.delimited import read_cells
from ldae.data.table import SPLITS
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, replacing, write_json
from ldae.utils.seeding import derive_seed

log = logging.getLogger(__name__)

ROUNDING = 1e-9  # a number of subjects that falls short of a whole one by this much is whole


@dataclass(frozen=True)
class Split:
    """The split of every subject of a cohort, which `store` writes once the cohort is accepted.

    Attributes:
        of_subject: split by subject, of the table and of the stored split.
        path: where it is stored; None for a cohort whose split is not stored.
        earlier: hashes of the splits that this one extends. A model that was trained with one of them has seen no
            test subject of this one.
        fold: number of the fold that is the test split, and number of folds; None if the shares were drawn.
        is_stored: whether it is stored already.
    """

    of_subject: Mapping[str, str]
    path: Path | None = None
    earlier: tuple[str, ...] = ()
    fold: tuple[int, int] | None = None
    is_stored: bool = False

    def store(self) -> None:
        """Write the split and what it extends; nothing if that is done."""
        if self.path is None or self.is_stored:
            return
        record = {"fold": list(self.fold) if self.fold else None, "earlier": list(self.earlier)}
        write_json(_record_file(self.path), record)
        write_split(self.path, self.of_subject)


def plan_split(
    table: pd.DataFrame,
    path: Path | None,
    shares: Mapping[str, float],
    seed: int,
    fold: tuple[int, int] | None = None,
    extend: bool = False,
) -> Split:
    """The split of every subject of `table` and of the file `path`. Nothing is written: see `Split.store`.

    A split that the table itself gives takes precedence over the draw.

    Args:
        table: subject, months, diagnosis and, optionally, split (empty where it is to be drawn).
        path: where the split is stored; None for a cohort whose split is not stored.
        shares: fractions of subjects by split, summing to 1.
        seed: of the draw.
        fold: number of the fold that becomes the test split, and number of folds; the other subjects are divided in
            proportion to the shares of train and val.
        extend: draw subjects that the stored split does not name into it; the others stay where they are.

    Raises:
        UserError: the stored split is damaged, lacks a subject, is of another fold or contradicts the table's, or a
            split with a share has no subject.
    """
    shares = normalise_shares(shares)
    stored = read_split(path) if path is not None and path.exists() else {}
    column = table["split"] if "split" in table else [""] * len(table)
    own = {subject: split for subject, split in zip(table["subject"], column, strict=True) if split}
    _refuse_contradictions(own, stored, path)
    earlier, stored_fold = _read_record(path, stored, table, fold, seed)
    if stored:
        _check_fold(fold, stored_fold, path)
        fold = stored_fold
    elif own and fold is not None:
        raise UserError("the table has a split column, and data.split.fold is given: remove one of the two")
    new = sorted(set(table["subject"]) - stored.keys())
    if stored and new and not extend:
        names = ", ".join(new[:3]) + (", ..." if len(new) > 3 else "")
        raise UserError(
            f"{len(new)} of {table['subject'].nunique()} subjects of the table are not in the split of this run, "
            f"{path} ({names}). If the cohort has grown, data.split.extend=true "
            "draws the new ones and leaves the others where they are; for another cohort, use another name=..."
        )
    previous = {**stored, **own}
    if fold is not None and not stored:
        previous = dict.fromkeys(subjects_of_fold(table, *fold, seed), "test")
        rest = shares["train"] + shares["val"]
        shares = {"train": shares["train"] / rest, "val": shares["val"] / rest, "test": 0.0}
    splits = assign_splits(table, shares, seed, previous)
    refuse_empty_split(add_split(table, splits), shares, "the table")
    everyone = {**stored, **splits}
    if stored and everyone != stored:
        earlier = (*earlier, hash_split(stored))
        log.info("%d new subjects are drawn into the split of %d, who stay where they are", len(new), len(stored))
    return Split(everyone, path, earlier, fold, is_stored=everyone == stored)


def _refuse_contradictions(own: Mapping[str, str], stored: Mapping[str, str], path: Path | None) -> None:
    for subject, split in own.items():
        if stored.get(subject, split) != split:
            raise UserError(
                f"subject {subject!r} is in '{split}' by the table's split column, but in '{stored[subject]}' "
                f"by {path}: remove the column, or start under another name"
            )


def _record_file(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_record(
    path: Path | None, stored: Mapping[str, str], table: pd.DataFrame, fold: tuple[int, int] | None, seed: int
) -> tuple[tuple[str, ...], tuple[int, int] | None]:
    """Hashes of the splits that the stored one extends, and its fold.

    A run of an earlier version has no such record: there the fold is found by its test subjects.
    """
    if path is None or not stored:
        return (), None
    file = _record_file(path)
    if not file.exists():
        known = table[table["subject"].isin(stored.keys())]
        test = {subject for subject in known["subject"] if stored[subject] == "test"}
        return (), fold if fold is not None and subjects_of_fold(known, *fold, seed) == test else None
    try:
        record = read_json(file)
        found = record["fold"]
        return tuple(map(str, record["earlier"])), (int(found[0]), int(found[1])) if found else None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{file} is damaged ({error}): restore it, or start under another name") from error


def _check_fold(fold: tuple[int, int] | None, stored: tuple[int, int] | None, path: Path | None) -> None:
    """Refuse a fold other than that of the stored split, which would have no effect."""
    if fold is not None and fold != stored:
        what = f"fold {stored[0]} of {stored[1]}" if stored else "no such fold"
        raise UserError(f"data.split.fold={fold[0]} of {fold[1]}, but {path} is {what}: use another name=... for it")


def add_split(table: pd.DataFrame, splits: Mapping[str, str]) -> pd.DataFrame:
    """`table` with the column `split`."""
    column = pd.Series([splits[subject] for subject in table["subject"]], index=table.index, dtype=object)
    return table.assign(split=column)


def assign_splits(
    table: pd.DataFrame, shares: Mapping[str, float], seed: int, previous: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Draw the split of every subject of `table`, stratified by first known diagnosis.

    Every split with a share gets at least one subject if there are enough.

    Args:
        table: subject, months and diagnosis.
        shares: fractions of subjects by split, summing to 1.
        previous: assignments to keep; new subjects fill what these leave open.

    Returns:
        Split by subject, for the subjects of `table`.

    Raises:
        UserError: the shares are not fractions that sum to 1.
    """
    fractions = np.array(list(normalise_shares(shares).values()))
    strata = _first_diagnoses(table)
    result = {subject: split for subject, split in (previous or {}).items() if subject in strata}
    new = sorted(strata.keys() - result.keys(), key=lambda subject: (derive_seed(seed, "split", subject), subject))
    if not new:
        return result
    members: dict[str, list[str]] = {}
    for subject in new:
        members.setdefault(strata[subject], []).append(subject)
    kept = Counter((strata[subject], split) for subject, split in result.items())
    names = sorted(members)
    sizes = np.array([len(members[name]) for name in names])
    wanted = _fill(fractions, np.array([[kept[name, split] for split in SPLITS] for name in names]), sizes)
    of_all = Counter(result.values())
    totals = _whole_numbers(fractions, np.array([of_all[split] for split in SPLITS]), len(new))
    for name, counts in zip(names, _round_to_totals(wanted, sizes, totals), strict=True):
        result |= dict(zip(members[name], np.repeat(SPLITS, counts).tolist(), strict=True))
    return result


def subjects_of_fold(table: pd.DataFrame, fold: int, folds: int, seed: int) -> set[str]:
    """The subjects of fold `fold` of `folds`, stratified by first known diagnosis. Every subject is in one fold.

    Raises:
        UserError: there is no such fold.
    """
    if not 0 <= fold < folds or folds < 2:
        raise UserError(f"data.split.fold={fold}: with data.split.folds={folds} it is one of 0 to {folds - 1}")
    strata = _first_diagnoses(table)
    order = sorted(strata, key=lambda subject: (strata[subject], derive_seed(seed, "fold", subject), subject))
    return set(order[fold::folds])


def refuse_empty_split(table: pd.DataFrame, shares: Mapping[str, float], where: str) -> None:
    """Refuse a table in which a split that has a share has no scan.

    Args:
        where: what the table is, for the message.

    Raises:
        UserError: there is such a split.
    """
    for name, share in shares.items():
        if share > 0 and not (table["split"] == name).any():
            count = table["subject"].nunique()
            raise UserError(
                f"split '{name}' is empty: {where} has {count} subjects, none of them in it; "
                f"add subjects, or change data.split.{name}"
            )


def normalise_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """The fractions of all three splits, in the order of SPLITS.

    Raises:
        UserError: an unknown split, a negative share, or a sum that is not 1.
    """
    for name, share in shares.items():
        if name not in SPLITS:
            raise UserError(f"data.split.{name}: no such split; there are {', '.join(SPLITS)}")
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise UserError(f"data.split.{name}={share}: a share is between 0 and 1")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"data.split: the shares sum to {total:g}, not 1")
    return {name: float(shares.get(name, 0)) / total for name in SPLITS}


def hash_split(splits: Mapping[str, str]) -> str:
    """SHA-256 of a split, hexadecimal."""
    # The length of a name comes before the name: no two different splits give the same text.
    text = "".join(f"{len(subject)}:{subject}:{split}\n" for subject, split in sorted(splits.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def read_split(path: Path) -> dict[str, str]:
    """The stored split.

    Raises:
        UserError: the file is missing or damaged.
    """
    result: dict[str, str] = {}
    records = read_cells(path)
    if next(records, (1, []))[1] != ["subject", "split"]:
        raise UserError(f"{path}, line 1: the header is not 'subject,split'; restore the file")
    for line, cells in records:
        if len(cells) != 2 or cells[1] not in SPLITS or result.get(cells[0], cells[1]) != cells[1]:
            raise UserError(f"{path}, line {line}: {','.join(cells)!r} is not one subject and its split")
        result[cells[0]] = cells[1]
    return result


def write_split(path: Path, splits: Mapping[str, str]) -> None:
    """Store a split atomically."""
    rows = pd.DataFrame(sorted(splits.items()), columns=["subject", "split"])
    with replacing(path) as temporary:
        rows.to_csv(temporary, index=False, lineterminator="\n")
    log.info("split of %d subjects written to %s", len(rows), path)


def _first_diagnoses(table: pd.DataFrame) -> dict[str, str]:
    """The first known diagnosis of each subject in the order of visits; "" where none is known."""
    found: dict[str, str] = {}
    ordered = table.sort_values("months", kind="stable")
    for subject, diagnosis in zip(ordered["subject"], ordered["diagnosis"], strict=True):
        found[subject] = found.get(subject) or diagnosis
    return found


def _fill(fractions: np.ndarray, kept: np.ndarray, new: np.ndarray) -> np.ndarray:
    """How many of `new` subjects each split should get for all subjects to come near `fractions`; not whole numbers.

    Args:
        fractions: (3,) of each split.
        kept: (..., 3) subjects that are in each split already.
        new: (...) subjects to distribute.
    """
    total = new + kept.sum(-1)
    missing = np.maximum(fractions * total[..., None] - kept, 0.0)
    return missing * (new / missing.sum(-1))[..., None]


def _whole_numbers(fractions: np.ndarray, kept: np.ndarray, new: int) -> np.ndarray:
    """`_fill` in whole subjects by largest remainder, (3,); splits with a share and no subject come first."""
    wanted = _fill(fractions, kept, np.array(new))
    counts = np.floor(wanted + ROUNDING).astype(int)
    counts[np.argsort(counts - wanted, kind="stable")[: new - counts.sum()]] += 1
    for split in np.flatnonzero((fractions > 0) & (counts + kept == 0)):
        largest = counts.argmax()
        if counts[largest] > 1:
            counts[largest] -= 1
            counts[split] += 1
    return counts


def _round_to_totals(wanted: np.ndarray, sizes: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Round `wanted`, (strata, 3), to whole numbers whose sums by stratum are `sizes` and by split are `totals`."""
    counts = np.floor(wanted + ROUNDING).astype(int)
    # If `totals` gave a subject to an empty split, the floors of another may exceed its total: the largest are reduced.
    for split in np.flatnonzero(counts.sum(0) > totals):
        excess = counts[:, split].sum() - totals[split]
        for stratum in np.argsort(-counts[:, split], kind="stable"):
            removed = min(excess, counts[stratum, split])
            counts[stratum, split] -= removed
            excess -= removed
    open_strata, open_splits = (sizes - counts.sum(1)).tolist(), (totals - counts.sum(0)).tolist()
    # The largest remainders are rounded up; equal ones in the order of the names of strata and splits.
    by_name = np.argsort(SPLITS)
    order = np.argsort((counts - wanted)[:, by_name], axis=None, kind="stable")
    while any(open_strata):
        for cell in order.tolist():
            stratum, split = cell // len(SPLITS), by_name[cell % len(SPLITS)]
            if open_strata[stratum] > 0 and open_splits[split] > 0:
                counts[stratum, split] += 1
                open_strata[stratum] -= 1
                open_splits[split] -= 1
    return counts
