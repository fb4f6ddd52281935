"""Proves through `ldae preprocess` that data as people have them give the right table, or one line that says why not.

Each test makes one kind of input with values of its own and compares the whole table. How single files, cells and
labels are read is proved in test_nifti.py, test_columns.py and test_sessions.py.
"""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from ldae.cli import main
from ldae.data.table import read_table
from ldae.preprocessing.volume import Volume
from ldae.utils.files import read_json
from small_datasets import bids, brain

pytestmark = pytest.mark.usefixtures("no_worker_processes")

OPTIONS = ("--bias", "none", "--brain", "stripped", "--registration", "none", "--spacing", "4", "-j", "1")
COLUMNS = ["subject", "months", "age", "sex", "diagnosis"]


def preprocess(folder: Path, *more: str | Path, source: str = "raw") -> Result:
    """Run `ldae preprocess` on `folder`/raw into `folder`/out; a defect of the program fails the test."""
    arguments = ["preprocess", folder / source, folder / "out", *OPTIONS, *more]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def rows(folder: Path) -> list[tuple]:
    """The table as training reads it: subject, months, age, sex, diagnosis; a missing age is None."""
    table = read_table(folder / "out" / "scans.csv").reindex(columns=COLUMNS).astype(object)
    return [tuple(row) for row in table.where(table.notna(), None).itertuples(index=False)]


def reasons(folder: Path) -> str:
    return "\n".join(pd.read_csv(folder / "out" / "rejected.csv")["reason"])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("participants.tsv", "PTID\tAGE\tPTGENDER\tDX\n7\t61,5\tFemale\tMCI\n", (61.5, "F", "MCI")),
        ("participants.tsv", "Subject,Age,Gender,Group\nSUB-07,89+,male,AD\n", (89.0, "M", "AD")),
        ("participants.tsv", "participant_id;age;sex;dx\nsub-007;60-64;f;CN\n", (62.0, "F", "CN")),
        ("participants.tsv", "participant_id   age   sex\n007   065Y   M\n", (65.0, "M", "")),
    ],
    ids=["numbers", "commas", "semicolons", "spaces"],
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_participants_are_read_however_they_are_written(tmp_path, name, text, expected, encoding):
    bids(tmp_path / "raw", {"sub-007": brain()})
    (tmp_path / "raw" / name).write_text(text, encoding=encoding)
    assert preprocess(tmp_path).exit_code == 0
    assert rows(tmp_path) == [("sub-007", 0, *expected)]


def test_participants_that_match_no_scan_are_no_success(tmp_path):
    bids(tmp_path / "raw", {"sub-1": brain()}, "participant_id age\nsub-x 55\n")
    result = preprocess(tmp_path)
    assert result.exit_code == 2
    assert "sub-x" in result.output
    assert rows(tmp_path) == [("sub-1", 0, None, "", "")]


def test_each_session_has_its_own_row(tmp_path):
    participants = "participant_id session_id age diagnosis\nsub-3 ses-M006 58.5 MCI\nsub-3 ses-M000 58 CN\n"
    bids(tmp_path / "raw", {"sub-3/ses-M000": brain(), "sub-3/ses-M006": brain(seed=1)}, participants)
    assert preprocess(tmp_path).exit_code == 0
    assert rows(tmp_path) == [("sub-3", 0, 58.0, "", "CN"), ("sub-3", 6, 58.5, "", "MCI")]


def test_sessions_of_several_studies_in_one_folder_are_put_in_months(tmp_path):
    names = ("sub-1/ses-bl", "sub-1/ses-m18", "sub-2/ses-01", "sub-2/ses-02", "sub-3/ses-d0000", "sub-3/ses-d0365")
    bids(tmp_path / "raw", {name: brain(seed=seed) for seed, name in enumerate(names)})
    (tmp_path / "raw" / "sub-2" / "sub-2_sessions.tsv").write_text("session_id\tage\nses-01\t70\nses-02\t73\n")
    assert preprocess(tmp_path).exit_code == 0
    assert [row[:2] for row in rows(tmp_path)] == [
        ("sub-1", 0), ("sub-1", 18), ("sub-2", 0), ("sub-2", 36), ("sub-3", 0), ("sub-3", 12),
    ]  # fmt: skip


def test_a_session_may_be_named_by_its_folder_alone(tmp_path):
    for session in ("ses-M000", "ses-M036"):
        brain().write(tmp_path / "raw" / "sub-9" / session / "anat" / "sub-9_T1w.nii.gz")
    assert preprocess(tmp_path).exit_code == 0
    assert [row[:2] for row in rows(tmp_path)] == [("sub-9", 0), ("sub-9", 36)]


@pytest.mark.parametrize(("choice", "taken"), [("first", 1), ("last", 3)])
def test_one_of_several_runs_is_taken_and_the_others_are_listed(tmp_path, choice, taken):
    for number in (1, 2, 3):
        brain(seed=number).write(tmp_path / "raw" / "sub-1" / "anat" / f"sub-1_run-{number}_T1w.nii.gz")
    assert preprocess(tmp_path, "--run", choice).exit_code == 0
    assert [row[:2] for row in rows(tmp_path)] == [("sub-1", 0)]
    assert f"run-{taken}" in read_json(tmp_path / "out" / "records" / "sub-1.json")["source"]
    assert reasons(tmp_path).count("not taken") == 2


def test_of_two_files_of_one_name_the_one_taken_is_named_with_its_folder(tmp_path):
    for seed, folder in enumerate("ab"):
        brain(seed=seed).write(tmp_path / folder / "T1.nii.gz")
    (tmp_path / "list.csv").write_text("path,subject\na/T1.nii.gz,x\nb/T1.nii.gz,x\n", encoding="utf-8")
    assert preprocess(tmp_path, source="list.csv").exit_code == 0
    assert "a/T1.nii.gz is the first" in reasons(tmp_path)


def test_copies_and_dotfiles_are_no_scans_and_links_are_followed(tmp_path):
    store = bids(tmp_path / "store", {"sub-2": brain(seed=2)})
    root = bids(tmp_path / "raw", {"sub-1": brain()})
    (root / "sub-2").symlink_to(store / "sub-2")
    anat = root / "sub-1" / "anat"
    (anat / "sub-1_T1w.nii").write_bytes(gzip.decompress((anat / "sub-1_T1w.nii.gz").read_bytes()))
    (anat / "._sub-1_T1w.nii.gz").write_bytes(b"\0\5\x16\7")
    assert preprocess(tmp_path).exit_code == 0
    assert [row[:2] for row in rows(tmp_path)] == [("sub-1", 0), ("sub-2", 0)]
    assert reasons(tmp_path) == "not taken: it has the same voxels as sub-1_T1w.nii.gz"


def test_a_table_that_was_not_fetched_is_named(tmp_path):
    bids(tmp_path / "raw", {"sub-1": brain()})
    (tmp_path / "raw" / "participants.tsv").symlink_to("../.git/annex/objects/p.tsv")
    result = preprocess(tmp_path)
    assert result.exit_code == 2
    assert "participants.tsv" in result.output.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_names_that_are_not_utf8_or_have_dots(tmp_path):
    root = bids(tmp_path / "raw", {"sub-1": brain()})
    folder = os.fsencode(root) + b"/sub-Jos\xe9/anat"
    os.makedirs(folder)
    Path(os.fsdecode(folder + b"/sub-Jos\xe9_T1w.nii.gz")).write_bytes(
        (root / "sub-1" / "anat" / "sub-1_T1w.nii.gz").read_bytes()
    )
    assert preprocess(tmp_path).exit_code == 0
    assert [row[0] for row in rows(tmp_path)] == ["sub-1"]
    assert "UTF-8" in reasons(tmp_path)


def test_identifiers_with_dots_are_subjects_of_their_own(tmp_path):
    for end in (4, 5):
        brain(seed=end).write(tmp_path / "s" / f"2.16.840.{end}.nii.gz")
    (tmp_path / "list.csv").write_text("path;age\ns/2.16.840.4.nii.gz;50,5\ns/2.16.840.5.nii.gz;60\n")
    assert preprocess(tmp_path, source="list.csv").exit_code == 0
    assert [row[2] for row in rows(tmp_path)] == [50.5, 60.0]
    assert len({row[0] for row in rows(tmp_path)}) == 2


def test_two_lists_share_one_output(tmp_path):
    for seed, name in enumerate(("north", "south")):
        brain(seed=seed).write(tmp_path / f"{name}.nii.gz")
        (tmp_path / f"{name}.csv").write_text(f"path,subject,age\n{name}.nii.gz,{name},{40 + seed}\n")
        assert preprocess(tmp_path, source=f"{name}.csv").exit_code == 0
    assert [row[:3] for row in rows(tmp_path)] == [("sub-north", 0, 40.0), ("sub-south", 0, 41.0)]


def damage(path: Path) -> None:
    """Change one bit in the middle of a gzip file that its structure does not show."""
    data = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), 0))
    data[len(data) // 3] ^= 16
    path.write_bytes(data)


def not_fetched(path: Path) -> None:
    path.unlink()
    path.symlink_to("../../../.git/annex/objects/x.nii.gz")


@pytest.mark.parametrize(("spoil", "reason"), [(damage, "checksum"), (not_fetched, "git annex get")])
def test_an_unusable_scan_is_rejected_and_without_others_the_command_fails(
    tmp_path, spoil: Callable[[Path], None], reason
):
    root = bids(tmp_path / "raw", {"sub-1": brain()})
    spoil(root / "sub-1" / "anat" / "sub-1_T1w.nii.gz")
    result = preprocess(tmp_path)
    assert result.exit_code == 2
    assert "none of the 1 scans is usable" in result.output
    assert reason in reasons(tmp_path)
    assert not (tmp_path / "out" / "scans.csv").exists()


def thick(path: Path) -> None:
    """Slices of 5.000001 mm where 5 is the limit."""
    image = Volume(brain(shape=(44, 52, 32)).data, np.diag([4.0, 4.0, 5.000001, 1.0]))
    image.affine[:3, 3] = (-86, -102, -77.5)
    image.write(path)


def mirrored(path: Path) -> None:
    image = nib.load(path)
    other = image.affine.copy()
    other[0] *= -1
    image = nib.Nifti1Image(image.get_fdata(dtype=np.float32), image.affine)
    image.set_sform(image.affine, 1)
    image.set_qform(other, 1)
    nib.save(image, path)


def standardised(path: Path) -> None:
    """Zero mean and unit variance in the brain, and a constant negative background."""
    volume = brain(seed=5)
    inside = volume.data > 0
    data = (volume.data - volume.data[inside].mean()) / volume.data[inside].std()
    Volume(np.where(inside, data, data.min() - 0.5).astype(np.float32), volume.affine).write(path)


@pytest.mark.parametrize(("change", "note"), [(thick, ""), (mirrored, "qform"), (standardised, "")])
def test_unusual_scans_are_read(tmp_path, change: Callable[[Path], None], note):
    root = bids(tmp_path / "raw", {"sub-1": brain()})
    change(root / "sub-1" / "anat" / "sub-1_T1w.nii.gz")
    result = preprocess(tmp_path)
    assert result.exit_code == 0, result.output
    assert [row[:2] for row in rows(tmp_path)] == [("sub-1", 0)]
    anat = tmp_path / "out" / "sub-1" / "anat"
    assert note in next(anat.glob("*res-*preproc*.json")).read_text()
    image = nib.load(next(anat.glob("*res-*preproc*.nii.gz"))).get_fdata()
    mask = nib.load(next(anat.glob("*res-*mask.nii.gz"))).get_fdata() > 0
    assert (image[~mask] == 0).all()
    assert np.mean(image[mask] == 0) < 0.001
