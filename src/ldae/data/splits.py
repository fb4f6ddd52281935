"""The split: train, val and test by subject, drawn once, written down, and never recomputed.

Drawn from (seed, subject) alone, so that neither the order of rows nor a filter moves anyone; written to split.csv, so
that rows added later find everyone else where they were.
"""

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from ldae.data.table import SPLITS, read_cells
from ldae.utils.errors import UserError
from ldae.utils.files import replacing
from ldae.utils.seeding import derive_seed

log = logging.getLogger(__name__)


def assign_splits(
    table: pd.DataFrame, shares: Mapping[str, float], seed: int, previous: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Split of every subject of `table`, stratified by its first known diagnosis.

    Every split with a share gets at least one subject where there are enough.

    Args:
        table: subject, months and diagnosis.
        shares: fractions of subjects by split, summing to 1.
        previous: assignments to keep; new subjects fill what these leave open.

    Returns:
        Subject to split, for the subjects of `table`.

    Raises:
        UserError: bad shares.
    """
    shares = normalise_shares(shares)
    strata = _strata(table)
    result = {subject: split for subject, split in (previous or {}).items() if subject in strata}
    new = sorted((s for s in strata if s not in result), key=lambda s: (derive_seed(seed, "split", s), s))
    if not new:
        return result
    have = Counter(result.values())
    totals = _quota(shares, have, len(new))
    members: dict[str, list[str]] = {}
    for subject in new:
        members.setdefault(strata[subject], []).append(subject)
    kept = Counter((strata[subject], split) for subject, split in result.items())
    wanted = {
        name: _open_shares(shares, {split: kept[name, split] for split in SPLITS}, len(subjects))
        for name, subjects in sorted(members.items())
    }
    counts = _round(wanted, totals)
    for name, subjects in members.items():
        names = [split for split in SPLITS for _ in range(counts[name][split])]
        result |= dict(zip(subjects, names, strict=True))
    return result


def subjects_of_fold(table: pd.DataFrame, fold: int, folds: int, seed: int) -> set[str]:
    """The subjects of fold `fold` of `folds`, stratified by first known diagnosis: every subject is in exactly one.

    Raises:
        UserError: there is no such fold.
    """
    if not 0 <= fold < folds or folds < 2:
        raise UserError(f"data.split.fold={fold}: with data.split.folds={folds} it is one of 0 to {folds - 1}")
    strata = _strata(table)
    order = sorted(strata, key=lambda s: (strata[s], derive_seed(seed, "fold", s), s))
    return set(order[fold::folds])


def load_or_draw_split(
    table: pd.DataFrame,
    path: Path | None,
    shares: Mapping[str, float],
    seed: int,
    fold: tuple[int, int] | None = None,
) -> pd.DataFrame:
    """`table` with its `split` column, as stored in `path`, or drawn and stored there.

    A split that the table itself names wins over the draw; rows it leaves open are drawn. With `fold`, (which, of how
    many), test is that fold, and the others are drawn by the shares of train and val.

    Raises:
        UserError: the stored split is damaged or contradicts the table's, or a split with a share has no subject.
    """
    shares = normalise_shares(shares)
    stored = read_split(path) if path is not None and path.exists() else {}
    own = {s: split for s, split in zip(table["subject"], table.get("split", ()), strict=False) if split}
    for subject, split in own.items():
        if stored.get(subject, split) != split:
            raise UserError(
                f"subject {subject!r} is in '{split}' by the table's split column, but in '{stored[subject]}' "
                f"by {path}: remove the column, or start under another name"
            )
    previous = {**stored, **own}
    if fold is not None and not previous:
        previous = dict.fromkeys(subjects_of_fold(table, *fold, seed), "test")
        rest = shares["train"] + shares["val"]
        shares = {"train": shares["train"] / rest, "val": shares["val"] / rest, "test": 0.0}
    splits = assign_splits(table, shares, seed, previous)
    table = table.assign(split=pd.Series([splits[s] for s in table["subject"]], index=table.index, dtype=object))
    refuse_empty_split(table, shares, "the table")
    everyone = {**stored, **splits}
    if path is not None and everyone != stored:
        write_split(path, everyone)
    return table


def refuse_empty_split(table: pd.DataFrame, shares: Mapping[str, float], where: str) -> None:
    """Refuse a split that has a share but no scan.

    Raises:
        UserError: there is one.
    """
    for name, share in shares.items():
        if share > 0 and not (table["split"] == name).any():
            count = table["subject"].nunique()
            raise UserError(
                f"split '{name}' is empty: {where} has {count} subjects, none of them in it; "
                f"add subjects, or change data.split.{name}"
            )


def normalise_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """The shares of all three splits, normalised.

    Raises:
        UserError: an unknown split, a negative share, or a sum that is not 1.
    """
    for name, share in shares.items():
        if name not in SPLITS:
            raise UserError(f"data.split.{name}: no such split; there are {', '.join(SPLITS)}")
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            raise UserError(f"data.split.{name}={share}: a share lies between 0 and 1")
    total = sum(shares.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"data.split: the shares sum to {total:g}, not 1")
    return {name: float(shares.get(name, 0)) / total for name in SPLITS}


def hash_split(table: pd.DataFrame | Mapping[str, str]) -> str:
    """SHA-256, hex, of who is where: of a table's subject and split columns, or of a mapping."""
    pairs = table.items() if isinstance(table, Mapping) else zip(table["subject"], table["split"], strict=True)
    # Lengths before names: no two different splits give the same bytes.
    text = "".join(f"{len(subject)}:{subject}:{split}\n" for subject, split in sorted(set(pairs)))
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


def _strata(table: pd.DataFrame) -> dict[str, str]:
    """Subject to its first known diagnosis by visit, "" where none is known."""
    strata: dict[str, str] = {}
    ordered = table.sort_values("months", kind="stable")
    for subject, diagnosis in zip(ordered["subject"], ordered["diagnosis"], strict=True):
        strata[subject] = strata.get(subject) or diagnosis
    return strata


def _open_shares(shares: Mapping[str, float], have: Mapping[str, int], new: int) -> dict[str, float]:
    """How many of `new` subjects each split should get, as fractions, for all together to come near the shares."""
    total = new + sum(have.values())
    missing = {name: max(share * total - have.get(name, 0), 0.0) for name, share in shares.items()}
    factor = new / sum(missing.values())
    return {name: value * factor for name, value in missing.items()}


def _quota(shares: Mapping[str, float], have: Mapping[str, int], new: int) -> dict[str, int]:
    """The same in whole subjects, by largest remainder; splits with a share and no subject come first."""
    wanted = _open_shares(shares, have, new)
    counts = {name: math.floor(value + 1e-9) for name, value in wanted.items()}
    rest = sorted(wanted, key=lambda name: counts[name] - wanted[name])
    for name in rest[: new - sum(counts.values())]:
        counts[name] += 1
    for name in SPLITS:
        richest = max(counts, key=lambda other: counts[other])
        if shares[name] > 0 and counts[name] + have.get(name, 0) == 0 and counts[richest] > 1:
            counts[richest] -= 1
            counts[name] += 1
    return counts


def _round(wanted: Mapping[str, Mapping[str, float]], totals: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Round a table of strata by splits to whole subjects, keeping both its row sums and the given column sums."""
    counts = {name: {split: math.floor(value + 1e-9) for split, value in row.items()} for name, row in wanted.items()}
    rows = {name: round(sum(row.values())) - sum(counts[name].values()) for name, row in wanted.items()}
    columns = {split: totals[split] - sum(row[split] for row in counts.values()) for split in totals}
    for split in columns:
        # The floors may exceed a column's total by what is lent to an empty split: the largest cells give it back.
        for name in sorted(counts, key=lambda name: (-counts[name][split], name)):
            back = min(max(-columns[split], 0), counts[name][split])
            counts[name][split] -= back
            columns[split] += back
            rows[name] += back
    cells = [(counts[name][split] - wanted[name][split], name, split) for name in wanted for split in columns]
    while any(rows.values()):
        for _, name, split in sorted(cells):
            if rows[name] > 0 and columns[split] > 0:
                counts[name][split] += 1
                rows[name] -= 1
                columns[split] -= 1
    return counts
