"""Proves that several jobs can write into one output: tables are the same, whatever the order and number of jobs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ldae.cli import main
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, write_json
from ldae.utils.shards import Shard, remove_marks, shard_override
from small_datasets import bids, brain

OPTIONS = ("--bias", "none", "--brain", "stripped", "--registration", "none", "--spacing", "4", "-j", "1")
TABLES = ("scans.csv", "rejected.csv", "qc.html")
SCANS = 5  # of which the last cannot be read


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    root = bids(tmp_path_factory.mktemp("shards") / "raw", {f"sub-{n}": brain(seed=n) for n in range(SCANS)})
    (root / f"sub-{SCANS - 1}/anat/sub-{SCANS - 1}_T1w.nii.gz").write_text("not a scan")
    (root / "participants.tsv").write_text("participant_id\tage\nsub-0\t60\nsub-1\t61\n")
    return root


@pytest.fixture(scope="module")
def whole(raw) -> Path:
    """The output of one job."""
    assert preprocess(raw, raw.parent / "whole").exit_code == 0
    return raw.parent / "whole"


@pytest.fixture
def out(raw):
    """An output folder beside that of one job, since tables contain relative paths."""
    folder = raw.parent / "out"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def preprocess(source: Path, out: Path, *options: str):
    return CliRunner().invoke(main, ["preprocess", str(source), str(out), *OPTIONS, *options])


def start(source: Path, out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "ldae.cli", "preprocess", str(source), str(out), *OPTIONS, *options]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def tables(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in TABLES]


@pytest.mark.parametrize(
    ("text", "index", "count"), [("1/4", 0, 4), ("4/4", 3, 4), ("0/4", 3, 4), ("1/1", 0, 1), (" 12/100 ", 11, 100)]
)
def test_a_shard_counts_from_one_and_zero_is_the_last(text, index, count):
    assert Shard.parse(text) == Shard(index, count)


@pytest.mark.parametrize("text", ["", "3", "5/4", "1/0", "0/0", "-1/4", "1/4/2", "a/b", "1,4", "1.0/4"])
def test_something_else_is_no_shard(text):
    with pytest.raises(UserError, match="give I/N"):
        Shard.parse(text)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_shards_take_every_item_once(count):
    parts = [Shard.parse(f"{number}/{count}").take(range(10)) for number in range(count)]
    assert sorted(item for part in parts for item in part) == list(range(10))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_only_the_last_shard_finds_the_marks_of_all(tmp_path):
    shards = [Shard(index, 3) for index in (2, 0, 0, 1)]
    assert [shard.mark_finished(tmp_path, "a") for shard in shards] == [False, False, False, True]
    assert not Shard(0, 3).mark_finished(tmp_path, "another list of scans")
    remove_marks(tmp_path)
    assert not Shard(1, 3).mark_finished(tmp_path, "a")


def test_the_option_becomes_an_override():
    assert shard_override(["name=a", "--shard", "2/4"]) == ["name=a", "shard=2/4"]
    assert shard_override(["--shard=2/4", "seed=1"]) == ["shard=2/4", "seed=1"]
    assert shard_override(["seed=1"]) == ["seed=1"]


@pytest.mark.parametrize("order", [("1/2", "2/2"), ("2/3", "0/3", "1/3"), tuple(f"{n}/7" for n in range(7, 0, -1))])
def test_shards_in_any_order_and_number_write_the_same_tables_as_one_job(raw, whole, out, order):
    for shard in order:
        assert not (out / "scans.csv").exists()
        result = preprocess(raw, out, "--shard", shard)
        assert result.exit_code == 0, result.output
    assert tables(out) == tables(whole)


def test_the_same_shard_twice_does_no_harm(raw, whole, out):
    for shard in ("1/2", "1/2", "2/2"):
        assert preprocess(raw, out, "--shard", shard).exit_code == 0
    assert tables(out) == tables(whole)
    assert preprocess(raw, out, "--shard", "1/2").exit_code == 0
    assert tables(out) == tables(whole)


def test_merge_lists_what_is_finished_and_says_what_is_not(raw, whole, out):
    preprocess(raw, out, "--shard", "1/2")
    result = preprocess(raw, out, "--merge")
    assert result.exit_code == 2
    assert "2 of 5 scans are not preprocessed yet" in result.output
    assert (out / "scans.csv").read_text().count("\n") == 1 + 2
    assert preprocess(raw, out, "--shard", "2/2").exit_code == 0
    assert tables(out) == tables(whole)
    assert preprocess(raw, out, "--merge").exit_code == 0
    assert tables(out) == tables(whole)


def test_merge_finds_scans_that_were_preprocessed_with_other_parameters(raw, whole, out):
    shutil.copytree(whole, out)
    record = read_json(out / "records/sub-2.json")
    write_json(out / "records/sub-2.json", record | {"key": "other" + record["key"]})
    result = preprocess(raw, out, "--merge")
    assert result.exit_code == 2
    assert "1 of 5 scans are not preprocessed yet" in result.output
    assert "sub-2" in result.output


def test_merge_before_any_shard_writes_nothing(raw, out):
    result = preprocess(raw, out, "--merge")
    assert result.exit_code == 2
    assert "run the shards first" in result.output
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--shard", "3/2"), "give I/N"),
        (("--shard", "1/2", "--merge"), "exclude each other"),
        (("--shards", "4"), "no use without --launcher"),
        (("--set", "launcher.partition=cpu"), "no use without --launcher"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_written(raw, out, options, message):
    result = preprocess(raw, out, *options)
    assert result.exit_code == 2
    assert message in result.output
    assert not out.exists()


def test_two_processes_at_once_write_the_same_tables_as_one_job(raw, whole, out):
    jobs = [start(raw, out, "--shard", f"{number}/2") for number in (1, 2)]
    errors = [job.communicate()[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], errors
    assert tables(out) == tables(whole)
