"""Proves that a split is by subject, stratified, independent of the order of rows and of filters, and stored once."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ldae.data.splits import (
    add_split,
    assign_splits,
    hash_split,
    plan_split,
    read_split,
    subjects_of_fold,
)
from ldae.utils.errors import UserError

SHARES = {"train": 0.8, "val": 0.05, "test": 0.15}


def split_and_store(*arguments, **options) -> dict[str, str]:
    """The split by subject, stored as a stage does that accepts the cohort."""
    split = plan_split(*arguments, **options)
    split.store()
    return dict(split.of_subject)


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


def test_every_subject_is_in_one_split_and_shares_hold() -> None:
    counts = Counter(assign_splits(cohort(), SHARES, seed=1).values())
    assert counts == {"train": 160, "val": 10, "test": 30}


def test_the_order_of_rows_changes_nothing() -> None:
    table = cohort()
    for seed in range(3):
        assert assign_splits(table.sample(frac=1, random_state=seed), SHARES, 1) == assign_splits(table, SHARES, 1)
    assert assign_splits(table, SHARES, 2) != assign_splits(table, SHARES, 1)


def test_diagnoses_are_spread_evenly() -> None:
    """The number of subjects by diagnosis and split is within one of the exact share, as a plain draw's is not."""
    table = cohort(400)
    splits = assign_splits(table, SHARES, 3)
    known = table[table["diagnosis"] != ""].groupby("subject")["diagnosis"].first()
    first = {subject: known.get(subject, "") for subject in splits}
    sizes = Counter(first.values())
    cells = Counter((first[subject], split) for subject, split in splits.items())
    for diagnosis, size in sizes.items():
        for split, share in SHARES.items():
            assert abs(cells[diagnosis, split] - share * size) < 1.0 + 1e-9


def test_small_shares_and_small_cohorts_get_a_subject_in_every_split() -> None:
    tiny = {"train": 0.985, "val": 0.005, "test": 0.01}
    assert Counter(assign_splits(cohort(30), tiny, 0).values()) == {"train": 28, "val": 1, "test": 1}
    assert Counter(assign_splits(cohort(3), SHARES, 0).values()) == {"train": 1, "val": 1, "test": 1}
    assert Counter(assign_splits(cohort(20), {"train": 0.9, "val": 0, "test": 0.1}, 0).values()) == {
        "train": 18,
        "test": 2,
    }


@pytest.mark.parametrize("subjects", range(1, 40))
def test_counts_are_within_one_subject_of_the_shares(subjects: int) -> None:
    counts = Counter(assign_splits(cohort(subjects), {"train": 0.5, "val": 0.2, "test": 0.3}, 0).values())
    assert sum(counts.values()) == subjects
    for split, share in {"train": 0.5, "val": 0.2, "test": 0.3}.items():
        assert abs(counts[split] - share * subjects) < 1 or subjects < 5


def test_a_diagnosis_of_its_own_for_every_subject_is_accepted() -> None:
    table = pd.DataFrame({"subject": [f"{i}" for i in range(20000)], "months": 0})
    table["diagnosis"] = "d" + table["subject"]
    assert Counter(assign_splits(table, SHARES, 0).values()) == {"train": 16000, "val": 1000, "test": 3000}


def test_a_split_is_written_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    table = cohort()
    first = split_and_store(table, path, SHARES, 1)
    stamp, content = path.stat().st_mtime_ns, path.read_bytes()
    # Another seed, other shares, another order, a filter: no subject changes its split, and nothing is written.
    again = split_and_store(table.sample(frac=1, random_state=0), path, {"train": 0.5, "val": 0.25, "test": 0.25}, 9)
    assert again == first
    assert split_and_store(table[table["diagnosis"].isin(["AD", "CN"])], path, SHARES, 1) == first
    assert (path.stat().st_mtime_ns, path.read_bytes()) == (stamp, content)
    assert read_split(path) == first


def test_subjects_added_later_fill_the_shares_and_leave_the_others_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "split.csv"
    first = split_and_store(cohort(100), path, SHARES, 1)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"100 of 200 subjects of the table are not in the split.*extend=true"):
        split_and_store(cohort(200), path, SHARES, 1)
    assert path.read_bytes() == before
    split = plan_split(cohort(200).iloc[::-1], path, SHARES, 1, extend=True)
    assert path.read_bytes() == before  # nothing is written before the cohort is accepted
    assert split.earlier == (hash_split(first),)
    split.store()
    grown = dict(split.of_subject)
    assert first.items() <= grown.items()
    assert Counter(grown.values()) == {"train": 160, "val": 10, "test": 30}
    assert read_split(path) == grown
    # A smaller table later on removes no subject from the file, and what the split extends is remembered.
    assert plan_split(cohort(100), path, SHARES, 1).earlier == (hash_split(first),)
    assert split_and_store(cohort(100), path, SHARES, 1) == grown
    assert read_split(path) == grown


@pytest.mark.parametrize("of_an_earlier_version", [False, True])
def test_another_fold_than_the_stored_one_is_refused(tmp_path: Path, of_an_earlier_version: bool) -> None:
    path = tmp_path / "split.csv"
    first = split_and_store(cohort(50), path, SHARES, 1, (2, 5))
    if of_an_earlier_version:
        path.with_suffix(".json").unlink()
    assert split_and_store(cohort(50), path, SHARES, 1, (2, 5)) == first
    assert split_and_store(cohort(50), path, SHARES, 1) == first
    with pytest.raises(UserError, match=r"data\.split\.fold=3 of 5, but .* is .*fold.*use another name"):
        split_and_store(cohort(50), path, SHARES, 1, (3, 5))
    # New subjects do not change which fold it is.
    split_and_store(cohort(60), path, SHARES, 1, (2, 5), extend=True)
    assert split_and_store(cohort(60), path, SHARES, 1, (2, 5)).items() >= first.items()


def test_a_fold_and_a_split_column_contradict_each_other(tmp_path: Path) -> None:
    table = cohort(20)
    table["split"] = "train"
    with pytest.raises(UserError, match=r"split column, and data\.split\.fold"):
        plan_split(table, tmp_path / "split.csv", SHARES, 1, (0, 5))


def test_new_subjects_fill_the_splits_that_fall_short() -> None:
    table = cohort(100)
    previous = dict.fromkeys(table["subject"].unique()[:50], "train")
    counts = Counter(assign_splits(table, SHARES, 0, previous).values())
    assert counts == {"train": 80, "val": 5, "test": 15}
    everyone = dict.fromkeys(table["subject"].unique()[:95], "train")
    counts = Counter(assign_splits(table, SHARES, 0, everyone).values())
    assert counts["train"] == 95
    assert min(counts["val"], counts["test"]) >= 1


def test_the_split_column_of_a_table_takes_precedence(tmp_path: Path) -> None:
    table = cohort(40)
    drawn = assign_splits(table, SHARES, 0)
    swap = {"train": "test", "val": "val", "test": "train"}
    table["split"] = [swap[drawn[subject]] for subject in table["subject"]]
    path = tmp_path / "split.csv"
    own = dict(zip(table["subject"], table["split"], strict=True))
    assert split_and_store(table, path, SHARES, 0) == own
    assert read_split(path) == own
    # Not over a stored split: earlier stages have trained on that.
    table["split"] = [drawn[subject] for subject in table["subject"]]
    with pytest.raises(UserError, match=r"subject 's0.* but in '.*split\.csv"):
        split_and_store(table, path, SHARES, 0)


def test_rows_without_a_split_in_the_table_are_drawn() -> None:
    table = cohort(60)
    table["split"] = ["test" if subject == "s0005" else "" for subject in table["subject"]]
    found = split_and_store(table, None, SHARES, 0)
    assert found["s0005"] == "test"
    assert Counter(found.values()) == {"train": 48, "val": 3, "test": 9}


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="split 'test' is empty"):
        split_and_store(cohort(2), tmp_path / "split.csv", {"train": 0.6, "val": 0.3, "test": 0.1}, 0)
    assert not (tmp_path / "split.csv").exists()
    table = cohort(10).assign(split="train")
    with pytest.raises(UserError, match="split 'val' is empty"):
        split_and_store(table, None, SHARES, 0)


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
        split_and_store(cohort(10), path, SHARES, 0)


def test_the_hash_changes_with_any_subject_and_with_no_order() -> None:
    splits = split_and_store(cohort(), None, SHARES, 0)
    first = hash_split(splits)
    assert len(first) == 64
    assert hash_split(dict(reversed(splits.items()))) == first
    assert hash_split({subject: split for subject, split in splits.items() if subject != "s0000"}) != first
    other = "val" if splits["s0000"] != "val" else "test"
    assert hash_split({**splits, "s0000": other}) != first


def test_the_column_of_a_table_follows_the_split() -> None:
    table = cohort(30)
    splits = split_and_store(table, None, SHARES, 0)
    found = add_split(table.iloc[::-1], splits)
    assert found["split"].tolist() == [splits[subject] for subject in table["subject"]][::-1]
    assert found.drop(columns="split").equals(table.iloc[::-1])


# The first 12 digits of the hashes of three draws: alone, after a draw over half of the subjects, and with most of the
# subjects already divided equally. Made by the first version of the draw: a seed must always give the same split.
EVEN, PUBLISHED = {"train": 0.5, "val": 0.25, "test": 0.25}, {"train": 0.8955, "val": 0.0045, "test": 0.1}
DRAWN = [
    (SHARES, 5, 1, "d302d61ed060", "eb1fa27ea30c", "5f152d924609"),
    (SHARES, 61, 2, "9e57a6e885cd", "3bf246d9bb08", "1d23b8e61bb3"),
    (SHARES, 400, 0, "b6773c6ab243", "bf382ada26f7", "9578945d7174"),
    (EVEN, 61, 2, "27c9e9a3edfe", "e3ce58cba96d", "1d23b8e61bb3"),
    (EVEN, 400, 0, "8e43bfc7aa60", "321453d7e3aa", "9578945d7174"),
    (PUBLISHED, 61, 2, "1739cb447743", "998e376c6427", "1d23b8e61bb3"),
    (PUBLISHED, 400, 0, "54a2d3cfcd40", "c2b8bfa42999", "9578945d7174"),
    ({"train": 0.9, "val": 0, "test": 0.1}, 400, 0, "9059a0881fc2", "e62ea69e877a", "9578945d7174"),
]


@pytest.mark.parametrize(("shares", "subjects", "seed", "alone", "grown", "divided"), DRAWN)
def test_a_seed_gives_the_split_that_it_gave_in_the_first_version(
    shares: dict[str, float], subjects: int, seed: int, alone: str, grown: str, divided: str
) -> None:
    table = cohort(subjects, seed)
    names = table["subject"].unique()[: 9 * subjects // 10]
    previous = {name: ("train", "val", "test")[number % 3] for number, name in enumerate(names)}
    half = assign_splits(cohort(subjects // 2 + 1, seed), shares, seed + 1)
    draws = (None, half, previous)
    assert [hash_split(assign_splits(table, shares, seed, kept))[:12] for kept in draws] == [alone, grown, divided]


@pytest.mark.parametrize(("subjects", "seed", "expected"), [(24, 0, "f13391ba6a2e"), (400, 1, "ad6399ea26cd")])
def test_a_seed_gives_the_fold_that_it_gave_in_the_first_version(subjects: int, seed: int, expected: str) -> None:
    members = sorted(subjects_of_fold(cohort(subjects, seed), 2, 5, seed))
    assert hashlib.sha256(repr(members).encode()).hexdigest()[:12] == expected
