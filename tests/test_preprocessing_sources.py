"""Proves that folders as they are become tables: sessions, runs, copies, links, odd names, several lists in one folder.

Every table that is written can be read for training.
"""

import gzip
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from ldae.cli import main
from ldae.data.table import read_table
from ldae.preprocessing.regions import find_label_maps
from ldae.preprocessing.session_scans import BEST, FIRST, LAST
from ldae.preprocessing.session_times import SessionTime, order_sessions
from ldae.preprocessing.sources import find_scans
from ldae.preprocessing.steps import PreprocessingSteps
from ldae.preprocessing.volume import Volume
from ldae.utils.errors import UserError
from ldae.utils.files import read_json
from small_datasets import WITHOUT_ANTS, bids, brain, run

pytestmark = pytest.mark.usefixtures("no_worker_processes")

OPTIONS = ("--bias", "none", "--brain", "stripped", "--registration", "none", "--spacing", "4", "-j", "1")


def scans(out: Path) -> list[tuple[str, int]]:
    """Subject and months of each row of scans.csv."""
    table = read_table(out / "scans.csv")
    return list(zip(table["subject"], table["months"].tolist(), strict=True))


def rejected(out: Path) -> dict[str, str]:
    """Reason by file name, of rejected.csv."""
    table = pd.read_csv(out / "rejected.csv")
    return {Path(path).name: reason for path, reason in zip(table["path"], table["reason"], strict=True)}


def digests(folder: Path) -> dict[str, str]:
    """A hash of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_sessions_of_several_studies_are_put_in_months(tmp_path):
    names = ("sub-1/ses-bl", "sub-1/ses-m06", "sub-2/ses-1", "sub-2/ses-2", "sub-3/ses-d0000", "sub-3/ses-d0365",
             "sub-4/ses-pre", "sub-4/ses-post")  # fmt: skip
    root = bids(tmp_path / "raw", {name: brain() for name in names})
    text = "session_id\tacq_time\nses-1\t2010-01-01T10:00:00\nses-2\t2012-01-01T10:00:00\n"
    (root / "sub-2" / "sub-2_sessions.tsv").write_text(text)
    for session, date in (("ses-pre", "2015-03-01"), ("ses-post", "2015-06-01")):
        row = f"anat/sub-4_{session}_T1w.nii.gz\t{date}T09:00:00\n"
        (root / "sub-4" / session / f"sub-4_{session}_scans.tsv").write_text("filename\tacq_time\n" + row)
    run(root, tmp_path / "out")
    expected = [("sub-1", 0), ("sub-1", 6), ("sub-2", 0), ("sub-2", 24), ("sub-3", 0), ("sub-3", 12)]
    expected += [("sub-4", 0), ("sub-4", 3)]
    assert scans(tmp_path / "out") == expected


@pytest.mark.parametrize(
    ("times", "months", "refused"),
    [
        ({"ses-bl": {}, "ses-m12": {}}, {"ses-bl": 0, "ses-m12": 12}, []),
        ({"ses-01": {}, "ses-02": {}}, {"ses-01": 0}, ["ses-02"]),
        ({"ses-01": {"age": 70.0}, "ses-02": {"age": 71.5}}, {"ses-01": 0, "ses-02": 18}, []),
        ({"ses-bl": {"age": 70.0}, "ses-x": {"age": 72.0}}, {"ses-bl": 0, "ses-x": 24}, []),
        ({"ses-20100101": {}, "ses-20110702": {}}, {"ses-20100101": 0, "ses-20110702": 18}, []),
        ({"ses-bl": {}, "ses-extra": {}}, {"ses-bl": 0}, ["ses-extra"]),
        ({"ses-pre": {}, "ses-M012": {}}, {}, ["ses-pre", "ses-M012"]),
        ({"": {}, "ses-M012": {}}, {}, ["", "ses-M012"]),
        ({"ses-7": {}}, {"ses-7": 0}, []),
    ],
)
def test_no_baseline_is_lost_while_follow_ups_stay(times, months, refused):
    order = order_sessions("sub-1", {label: SessionTime(**time) for label, time in times.items()}, times)
    assert order.months == months
    assert list(order.problems) == refused
    assert all("sub-1" in reason or "its session" in reason for reason in order.problems.values())


def test_the_session_may_be_named_by_the_folder_alone_but_not_in_two_ways(tmp_path):
    for session in ("ses-M000", "ses-M012"):
        brain().write(tmp_path / "raw" / "sub-1" / session / "anat" / "sub-1_T1w.nii.gz")
    brain().write(tmp_path / "raw" / "sub-2" / "ses-M000" / "anat" / "sub-2_ses-M006_T1w.nii.gz")
    run(tmp_path / "raw", tmp_path / "out")
    assert scans(tmp_path / "out") == [("sub-1", 0), ("sub-1", 12)]
    assert "its folder is ses-M000" in rejected(tmp_path / "out")["sub-2_ses-M006_T1w.nii.gz"]


def test_of_two_sessions_in_one_month_one_is_taken_and_the_other_is_noted(tmp_path):
    run(bids(tmp_path / "raw", {"sub-1/ses-M12": brain(), "sub-1/ses-M012": brain(seed=1)}), tmp_path / "out")
    assert scans(tmp_path / "out") == [("sub-1", 12)]
    assert "month (ses-M12 and ses-M012)" in rejected(tmp_path / "out")["sub-1_ses-M12_T1w.nii.gz"]


@pytest.mark.parametrize(("choice", "taken"), [(FIRST, 1), (LAST, 10), (BEST, 2)])
def test_one_of_several_runs_is_taken_by_the_choice_and_the_others_are_noted(tmp_path, choice, taken):
    anat = tmp_path / "raw" / "sub-1" / "anat"
    for number, noise in ((1, 4.0), (2, 1.0), (10, 3.0)):
        brain(noise=noise, seed=number).write(anat / f"sub-1_run-{number}_T1w.nii.gz")
    run(tmp_path / "raw", tmp_path / "out", choice=choice)
    record = read_json(tmp_path / "out" / "records" / "sub-1.json")
    assert record["source"].endswith(f"sub-1_run-{taken}_T1w.nii.gz")
    others = {f"sub-1_run-{number}_T1w.nii.gz" for number in {1, 2, 10} - {taken}}
    assert set(rejected(tmp_path / "out")) == others
    assert all(f"--run {choice.name}" in reason for reason in rejected(tmp_path / "out").values())
    stamp = (tmp_path / "out" / "records" / "sub-1.json").stat().st_mtime_ns
    run(tmp_path / "raw", tmp_path / "out", choice=choice)
    assert (tmp_path / "out" / "records" / "sub-1.json").stat().st_mtime_ns == stamp


def test_if_the_first_run_is_rejected_the_next_one_is_taken(tmp_path):
    anat = tmp_path / "raw" / "sub-1" / "anat"
    brain(half=(20, 20, 20)).write(anat / "sub-1_run-1_T1w.nii.gz")
    brain().write(anat / "sub-1_run-2_T1w.nii.gz")
    run(tmp_path / "raw", tmp_path / "out")
    assert scans(tmp_path / "out") == [("sub-1", 0)]
    assert "brain volume" in rejected(tmp_path / "out")["sub-1_run-1_T1w.nii.gz"]


def test_a_nii_beside_the_nii_gz_of_the_same_voxels_counts_once(tmp_path):
    root = bids(tmp_path / "raw", {"sub-1": brain()})
    packed = root / "sub-1" / "anat" / "sub-1_T1w.nii.gz"
    packed.with_name("sub-1_T1w.nii").write_bytes(gzip.decompress(packed.read_bytes()))
    run(root, tmp_path / "out")
    assert scans(tmp_path / "out") == [("sub-1", 0)]
    assert rejected(tmp_path / "out") == {"sub-1_T1w.nii": "not taken: it has the same voxels as sub-1_T1w.nii.gz"}


def test_dotfiles_are_no_scans_and_links_are_followed(tmp_path):
    root = bids(tmp_path / "raw", {"sub-1": brain()})
    (root / "sub-1" / "anat" / "._sub-1_T1w.nii.gz").write_bytes(b"\0\5\x16\7")
    store = bids(tmp_path / "store", {"sub-2": brain(seed=2)})
    (root / "sub-2").symlink_to(store / "sub-2")
    (root / "sub-3" / "anat").mkdir(parents=True)
    (root / "sub-3" / "anat" / "sub-3_T1w.nii.gz").symlink_to("../../.git/annex/objects/x.nii.gz")
    run(root, tmp_path / "out")
    assert scans(tmp_path / "out") == [("sub-1", 0), ("sub-2", 0)]
    assert "git annex get" in rejected(tmp_path / "out")["sub-3_T1w.nii.gz"]


def test_label_maps_are_found_behind_links_and_by_their_folders(tmp_path):
    labels = Volume(np.ones((4, 4, 4), np.float32), np.eye(4))
    for name in ("a/sub-1_dseg.nii.gz", "sub-2/ses-M012/._sub-2_dseg.nii.gz", "sub-2/ses-M012/sub-2_dseg.nii.gz"):
        labels.write(tmp_path / "store" / name)
    (tmp_path / "store" / "a" / "circle").symlink_to(tmp_path / "store")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "link").symlink_to(tmp_path / "store")
    assert set(find_label_maps(tmp_path / "labels")) == {("1", ""), ("2", "M012")}


def test_a_path_that_is_not_utf8_is_rejected_and_the_others_are_in_the_table(tmp_path):
    root = bids(tmp_path / "raw", {"sub-1": brain()})
    folder = os.fsencode(root) + b"/sub-M\xfcller/anat"
    os.makedirs(folder)
    shutil.copy(root / "sub-1" / "anat" / "sub-1_T1w.nii.gz", folder + b"/sub-M\xfcller_T1w.nii.gz")
    run(root, tmp_path / "out")
    assert scans(tmp_path / "out") == [("sub-1", 0)]
    assert ["not UTF-8" in reason for reason in rejected(tmp_path / "out").values()] == [True]


def test_names_with_dots_spaces_umlauts_and_brackets_are_subjects_of_their_own(tmp_path):
    names = ("1.2.840.1.nii.gz", "1.2.840.2.nii.gz", "a b [3]=&~.nii.gz", "ümlaut.nii.gz")
    for seed, name in enumerate(names):
        brain(seed=seed).write(tmp_path / "Übung [1]" / name)
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"Übung [1]/{name}\n" for name in names), encoding="utf-8")
    run(tmp_path / "list.csv", tmp_path / "out ü&=")
    assert [subject for subject, _ in scans(tmp_path / "out ü&=")] == [
        "sub-128401",
        "sub-128402",
        "sub-ab3",
        "sub-mlaut",
    ]


def two_lists(folder: Path) -> list[Path]:
    """Two lists of one scan each."""
    for name in "ab":
        brain(seed=ord(name)).write(folder / f"{name}.nii.gz")
        (folder / f"{name}.csv").write_text(f"path,subject,site,dx\n{name}.nii.gz,{name},{name},CN\n")
    return [folder / "a.csv", folder / "b.csv"]


def test_the_table_has_the_scans_of_all_lists_in_either_order(tmp_path):
    first, second = two_lists(tmp_path)
    for name, order in (("ab", (first, second)), ("ba", (second, first))):
        for source in order:
            run(source, tmp_path / name)
        assert scans(tmp_path / name) == [("sub-a", 0), ("sub-b", 0)]
        assert read_table(tmp_path / name / "scans.csv")["site"].tolist() == ["a", "b"]
    drop = ["path"]
    tables = [pd.read_csv(tmp_path / name / "scans.csv").drop(columns=drop) for name in ("ab", "ba")]
    pd.testing.assert_frame_equal(*tables)


def test_a_scan_of_another_list_is_not_overwritten(tmp_path):
    first, second = two_lists(tmp_path)
    run(first, tmp_path / "out")
    before = digests(tmp_path / "out" / "sub-a")
    second.write_text("path,subject\nb.nii.gz,a\n")
    with pytest.raises(UserError, match="has another scan of sub-a"):
        run(second, tmp_path / "out")
    assert digests(tmp_path / "out" / "sub-a") == before
    assert scans(tmp_path / "out") == [("sub-a", 0)]


def test_a_scan_that_its_list_no_longer_has_leaves_the_table_and_returns_without_computing(tmp_path):
    root = bids(tmp_path / "raw", {"sub-1": brain(), "sub-2": brain()})
    run(root, tmp_path / "out")
    figure = tmp_path / "out" / "figures" / "sub-2_desc-qc_T1w.jpg"
    stamp = figure.stat().st_mtime_ns
    (root / "sub-2").rename(tmp_path / "away")
    run(root, tmp_path / "out")
    assert scans(tmp_path / "out") == [("sub-1", 0)]
    (tmp_path / "away").rename(root / "sub-2")
    run(root, tmp_path / "out")
    assert scans(tmp_path / "out") == [("sub-1", 0), ("sub-2", 0)]
    assert figure.stat().st_mtime_ns == stamp


def test_corrected_participants_reach_the_table_without_computing(tmp_path):
    root = bids(tmp_path / "raw", {"sub-1": brain()}, "participant_id age\nsub-1 60\n")
    run(root, tmp_path / "out")
    (root / "participants.tsv").write_text("participant_id\tage\nsub-1\t61\n")
    assert run(root, tmp_path / "out")["age"].tolist() == [61]


def test_records_of_an_earlier_version_are_completed(tmp_path):
    root = bids(tmp_path / "raw", {"sub-1": brain()})
    run(root, tmp_path / "out")
    path = tmp_path / "out" / "records" / "sub-1.json"
    record = read_json(path)
    earlier = {
        name: record[name] for name in record if name not in ("row", "listed_in", "left_out", "subject", "session")
    }
    path.write_text(json.dumps(earlier))
    figure = tmp_path / "out" / "figures" / "sub-1_desc-qc_T1w.jpg"
    stamp = figure.stat().st_mtime_ns
    run(root, tmp_path / "out")
    assert scans(tmp_path / "out") == [("sub-1", 0)]
    assert figure.stat().st_mtime_ns == stamp


def test_an_interrupt_does_not_mix_parameters(tmp_path, monkeypatch):
    root = bids(tmp_path / "raw", {f"sub-{n}": brain() for n in range(2)})
    run(root, tmp_path / "out")

    def interrupted(function, items, *arguments, **options):
        yield 0, function(*items[0])
        raise KeyboardInterrupt

    monkeypatch.setattr("ldae.preprocessing.preprocess_cohort.run_in_processes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(
            root,
            tmp_path / "out",
            PreprocessingSteps(bias=None, brain=WITHOUT_ANTS.brain, registration=None, spacing=5.0),
        )
    assert scans(tmp_path / "out") == [("sub-0", 0)]


def mistyped(tmp_path: Path) -> dict[str, tuple[str, ...]]:
    """Wrong arguments of `ldae preprocess`, by part of the message."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "scans.csv").write_text("mine\n")
    raw, out = str(tmp_path / "raw"), str(tmp_path / "out")
    return {
        "is the source": (raw, raw),
        "no such folder": (raw + "x", out),
        "no label map": (raw, out, "--labels", raw + "x"),
        "no such file": (raw, out, "--participants", raw + "x"),
        "would be written": (str(tmp_path / "list.csv"), raw),
        "is a file": (raw, str(tmp_path / "list.csv")),
        "is kept": (raw, str(tmp_path / "own")),
        "--run": (raw, out, "--run", "frist"),
        "spacing": (raw, out, "--spacing", "1,5"),
    }


def test_a_refused_command_changes_no_byte(tmp_path):
    bids(tmp_path / "raw", {"sub-1": brain()})
    (tmp_path / "raw" / "dataset_description.json").write_text('{"Name": "my study"}')
    (tmp_path / "list.csv").write_text("path\nraw/sub-1/anat/sub-1_T1w.nii.gz\n")
    commands = mistyped(tmp_path)
    before = digests(tmp_path)
    for message, arguments in commands.items():
        result = CliRunner().invoke(
            main, ["preprocess", *arguments, *(OPTIONS if "--spacing" not in arguments else ())]
        )
        assert result.exit_code == 2, message
        assert message in result.output
        assert digests(tmp_path) == before
        assert not (tmp_path / "out").exists()


def test_the_description_of_another_program_is_kept(tmp_path):
    root = bids(tmp_path / "raw", {"sub-1": brain()})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "dataset_description.json").write_text('{"Name": "my study"}')
    run(root, tmp_path / "out")
    assert read_json(tmp_path / "out" / "dataset_description.json") == {"Name": "my study"}


def test_no_usable_scan_is_no_success(tmp_path):
    for subject in ("sub-1", "sub-2"):
        path = tmp_path / "raw" / subject / "anat" / f"{subject}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        path.write_text("x")
    result = CliRunner().invoke(main, ["preprocess", str(tmp_path / "raw"), str(tmp_path / "out"), *OPTIONS])
    assert result.exit_code == 2
    assert "none of the 2 scans is usable" in result.output
    assert "scans.csv" not in result.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("rows", "months"),
    [
        (["1,70", "2,72"], [0, 24]),  # they count the visits
        (["1.0,70", "2.0,72"], [0, 24]),
        (["01,70.0", "02,70.5"], [1, 2]),  # too near to tell: months, as in the table of training
        (["0,70", "12,71", "24,72"], [0, 12, 24]),
        (["0,70", "12,70", "24,70"], [0, 12, 24]),  # one age for all visits
        (["0,70", "6,27", "12,71", "18,71"], [0, 6, 12, 18]),  # one age is wrong
        (["1,", "2,"], [1, 2]),
    ],
)
def test_bare_numbers_are_months_unless_ages_show_that_they_count_the_visits(tmp_path, rows, months):
    for number, _ in enumerate(rows):
        brain(seed=number).write(tmp_path / f"{number}.nii.gz")
    lines = [f"{number}.nii.gz,a,{row}" for number, row in enumerate(rows)]
    (tmp_path / "list.csv").write_text("\n".join(["path,subject,session,age", *lines]) + "\n")
    run(tmp_path / "list.csv", tmp_path / "out")
    assert scans(tmp_path / "out") == [("sub-a", month) for month in months]


def test_runs_are_sorted_by_the_time_of_scans_tsv_if_it_is_known(tmp_path):
    anat = tmp_path / "raw" / "sub-1" / "anat"
    for number in (1, 2):
        brain(seed=number).write(anat / f"sub-1_run-{number}_T1w.nii.gz")
    rows = "anat/sub-1_run-1_T1w.nii.gz\t2010-01-01T11:00:00\nanat/sub-1_run-2_T1w.nii.gz\t2010-01-01T10:00:00\n"
    (anat.parent / "sub-1_scans.tsv").write_text("filename\tacq_time\n" + rows)
    run(tmp_path / "raw", tmp_path / "out")
    assert list(rejected(tmp_path / "out")) == ["sub-1_run-1_T1w.nii.gz"]
    assert len(find_scans(tmp_path / "raw")) == 2


def test_lists_with_different_parameters_are_named(tmp_path, caplog):
    first, second = two_lists(tmp_path)
    run(first, tmp_path / "out")
    assert "different parameters" not in caplog.text
    coarse = PreprocessingSteps(bias=None, brain=WITHOUT_ANTS.brain, registration=None, spacing=5.0)
    run(second, tmp_path / "out", coarse)
    assert "a.csv" in next(message for message in caplog.messages if "different parameters" in message)
