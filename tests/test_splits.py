"""The split: no subject in two, whatever the order of rows or the filter; stratified; written once and kept."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ldae.data.splits import assign_splits, hash_split, load_or_draw_split, read_split
from ldae.utils.errors import UserError

SHARES = {"train": 0.8, "val": 0.05, "test": 0.15}


def cohort(subjects: int = 200, seed: int = 0) -> pd.DataFrame:
    """1 to 4 visits a subject; the diagnosis may change, and may be unknown at first."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(subjects):
        diagnosis = ["AD", "CN", "MCI", ""][rng.choice(4, p=[0.2, 0.4, 0.35, 0.05])]
        for visit in range(rng.integers(1, 5)):
            later = "AD" if diagnosis == "MCI" and visit > 1 else diagnosis
            rows.append((f"s{number:04d}", visit * 6, "" if visit == 0 and number % 7 == 0 else later))
    return pd.DataFrame(rows, columns=["subject", "months", "diagnosis"])


def splits_of(table: pd.DataFrame) -> dict[str, str]:
    assert (table.groupby("subject")["split"].nunique() == 1).all()
    return dict(zip(table["subject"], table["split"], strict=True))


def test_every_subject_is_in_one_split_and_shares_hold() -> None:
    counts = Counter(assign_splits(cohort(), SHARES, seed=1).values())
    assert counts == {"train": 160, "val": 10, "test": 30}


def test_the_order_of_rows_changes_nothing() -> None:
    table = cohort()
    for seed in range(3):
        assert assign_splits(table.sample(frac=1, random_state=seed), SHARES, 1) == assign_splits(table, SHARES, 1)
    assert assign_splits(table, SHARES, 2) != assign_splits(table, SHARES, 1)


def test_diagnoses_are_spread_evenly() -> None:
    """Within one subject of the exact share, in every cell: shares drawn blindly would miss it."""
    table = cohort(400)
    splits = assign_splits(table, SHARES, 3)
    known = table[table["diagnosis"] != ""].groupby("subject")["diagnosis"].first()
    first = {subject: known.get(subject, "") for subject in splits}
    sizes = Counter(first.values())
    cells = Counter((first[subject], split) for subject, split in splits.items())
    for diagnosis, size in sizes.items():
        for split, share in SHARES.items():
            assert abs(cells[diagnosis, split] - share * size) < 1.0 + 1e-9


def test_small_shares_and_small_cohorts_are_not_left_empty() -> None:
    tiny = {"train": 0.985, "val": 0.005, "test": 0.01}
    assert Counter(assign_splits(cohort(30), tiny, 0).values()) == {"train": 28, "val": 1, "test": 1}
    assert Counter(assign_splits(cohort(3), SHARES, 0).values()) == {"train": 1, "val": 1, "test": 1}
    assert Counter(assign_splits(cohort(20), {"train": 0.9, "val": 0, "test": 0.1}, 0).values()) == {
        "train": 18,
        "test": 2,
    }


@pytest.mark.parametrize("subjects", range(1, 40))
def test_largest_remainder(subjects: int) -> None:
    counts = Counter(assign_splits(cohort(subjects), {"train": 0.5, "val": 0.2, "test": 0.3}, 0).values())
    assert sum(counts.values()) == subjects
    for split, share in {"train": 0.5, "val": 0.2, "test": 0.3}.items():
        assert abs(counts[split] - share * subjects) < 1 or subjects < 5


def test_every_subject_its_own_diagnosis_is_no_fault_and_not_slow() -> None:
    table = pd.DataFrame({"subject": [f"{i}" for i in range(20000)], "months": 0})
    table["diagnosis"] = "d" + table["subject"]
    assert Counter(assign_splits(table, SHARES, 0).values()) == {"train": 16000, "val": 1000, "test": 3000}


def test_written_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    table = cohort()
    first = splits_of(load_or_draw_split(table, path, SHARES, 1))
    stamp, content = path.stat().st_mtime_ns, path.read_bytes()
    # Another seed, other shares, another order, a filter: nobody moves, nothing is written.
    again = load_or_draw_split(table.sample(frac=1, random_state=0), path, {"train": 0.5, "val": 0.25, "test": 0.25}, 9)
    assert splits_of(again) == first
    filtered = load_or_draw_split(table[table["diagnosis"].isin(["AD", "CN"])], path, SHARES, 1)
    assert splits_of(filtered).items() <= first.items()
    assert (path.stat().st_mtime_ns, path.read_bytes()) == (stamp, content)
    assert read_split(path) == first


def test_subjects_added_later_fill_the_shares_and_move_nobody(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    first = splits_of(load_or_draw_split(cohort(100), path, SHARES, 1))
    grown = splits_of(load_or_draw_split(cohort(200).iloc[::-1], path, SHARES, 1))
    assert first.items() <= grown.items()
    assert Counter(grown.values()) == {"train": 160, "val": 10, "test": 30}
    assert read_split(path) == grown
    # A later, smaller table does not shrink the file.
    load_or_draw_split(cohort(100), path, SHARES, 1)
    assert read_split(path) == grown


def test_new_subjects_go_where_they_are_missing() -> None:
    table = cohort(100)
    previous = dict.fromkeys(table["subject"].unique()[:50], "train")
    counts = Counter(assign_splits(table, SHARES, 0, previous).values())
    assert counts == {"train": 80, "val": 5, "test": 15}
    everyone = dict.fromkeys(table["subject"].unique()[:95], "train")
    counts = Counter(assign_splits(table, SHARES, 0, everyone).values())
    assert counts["train"] == 95
    assert min(counts["val"], counts["test"]) >= 1


def test_the_tables_own_split_wins(tmp_path: Path) -> None:
    table = cohort(40)
    drawn = assign_splits(table, SHARES, 0)
    swap = {"train": "test", "val": "val", "test": "train"}
    table["split"] = [swap[drawn[subject]] for subject in table["subject"]]
    path = tmp_path / "split.csv"
    assert splits_of(load_or_draw_split(table, path, SHARES, 0)) == splits_of(table)
    assert read_split(path) == splits_of(table)
    # Against a stored one it does not: earlier stages have trained on that.
    table["split"] = [drawn[subject] for subject in table["subject"]]
    with pytest.raises(UserError, match=r"subject 's0.* but in '.*split\.csv"):
        load_or_draw_split(table, path, SHARES, 0)


def test_rows_that_the_table_leaves_open_are_drawn() -> None:
    table = cohort(60)
    table["split"] = ["test" if subject == "s0005" else "" for subject in table["subject"]]
    found = splits_of(load_or_draw_split(table, None, SHARES, 0))
    assert found["s0005"] == "test"
    assert Counter(found.values()) == {"train": 48, "val": 3, "test": 9}


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split 'test' is empty"):
        load_or_draw_split(cohort(2), tmp_path / "split.csv", {"train": 0.6, "val": 0.3, "test": 0.1}, 0)
    assert not (tmp_path / "split.csv").exists()
    table = cohort(10).assign(split="train")
    with pytest.raises(UserError, match="split 'val' is empty"):
        load_or_draw_split(table, None, SHARES, 0)


@pytest.mark.parametrize(
    "shares", [{"train": 0.8}, {"train": 1.2, "test": -0.2}, {"train": 0.5, "dev": 0.5}, {"train": float("nan")}]
)
def test_bad_shares_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"data\.split"):
        assign_splits(cohort(10), shares, 0)


@pytest.mark.parametrize("content", ["", "subject\na\n", "subject,split\na,dev\n", "subject,split\na,val\na,test\n"])
def test_a_damaged_split_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "split.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=r"split\.csv, line \d"):
        load_or_draw_split(cohort(10), path, SHARES, 0)


def test_the_hash_knows_who_is_where_and_nothing_else() -> None:
    table = load_or_draw_split(cohort(), None, SHARES, 0)
    first = hash_split(table)
    assert len(first) == 64
    assert hash_split(table.sample(frac=1, random_state=1)) == first
    assert hash_split(splits_of(table)) == first
    assert hash_split(table[table["subject"] != "s0000"]) != first
    moved = table.assign(
        split=["val" if s == "s0000" else p for s, p in zip(table["subject"], table["split"], strict=True)]
    )
    swapped = moved["split"].tolist() != table["split"].tolist()
    assert (hash_split(moved) != first) == swapped
    assert hash_split({"a": "train"}) == hash_split({"a": "train"}) != hash_split({"a": "test"})
