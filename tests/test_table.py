"""Proves what a valid table is read as, and that every fault is one line that names file, line and column."""

import math
import os
from pathlib import Path

import pandas as pd
import pytest

from ldae.data.table import read_table, write_table
from ldae.utils.errors import UserError

HEADER = "subject,session,path,diagnosis,age"


def write(folder: Path, *lines: str, header: str = HEADER, scans: tuple[str, ...] = ("a.nii", "b.nii")) -> Path:
    for name in scans:
        (folder / name).touch()
    path = folder / "scans.csv"
    path.write_text("\n".join((header, *lines)) + "\n", encoding="utf-8")
    return path


def message(path: Path, **options: bool) -> str:
    with pytest.raises(UserError) as caught:
        read_table(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_a_valid_table_is_read_as_typed_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "007,12,a.nii,AD,71.5", "", "x,ses-M000,b.nii,,", 'x,m6,"a.nii",n/a,NaN')
    table = read_table(path)
    assert list(table.columns) == ["subject", "session", "months", "path", "diagnosis", "age"]
    assert table["subject"].tolist() == ["007", "x", "x"]
    assert table["session"].tolist() == ["ses-M012", "ses-M000", "ses-M006"]
    assert table["months"].tolist() == [12, 0, 6]
    assert table["path"].tolist() == [str(tmp_path / name) for name in ("a.nii", "b.nii", "a.nii")]
    assert table["diagnosis"].tolist() == ["AD", "", ""]
    assert table["age"][0] == 71.5
    assert table["age"][1:].isna().all()


def test_unknown_columns_are_kept(tmp_path: Path) -> None:
    header = f"{HEADER},sex,site,volume,code,latent_path,note"
    path = write(
        tmp_path,
        'a,0,a.nii,CN,70,F,1,12.5,007,z/a.npz,"=HYPERLINK(""http://x"")"',
        "b,0,b.nii,CN,70,M,2,,010,,+1+cmd",
        header=header,
    )
    table = read_table(path)
    assert table["site"].tolist() == [1, 2]
    assert table["volume"][0] == 12.5
    assert math.isnan(table["volume"][1])
    assert table["code"].tolist() == ["007", "010"]
    assert table["note"].tolist() == ['=HYPERLINK("http://x")', "+1+cmd"]
    assert table["latent_path"].tolist() == [str(tmp_path / "z" / "a.npz"), ""]


def test_a_written_table_is_read_back_the_same_also_after_a_move(tmp_path: Path) -> None:
    header = f"{HEADER},split,code,volume,latent_path"
    lines = ("a,0,a.nii,CN,70.25,train,007,3.5,a.npz", 'b,12,b.nii,"M,C""I",,val,1,,')
    table = read_table(write(tmp_path, *lines, header=header))
    other = tmp_path / "other" / "copy.csv"
    write_table(table, other)
    pd.testing.assert_frame_equal(read_table(other), table)
    write_table(table, tmp_path / "copy.csv")
    moved = tmp_path.with_name(tmp_path.name + "-moved")
    os.rename(tmp_path, moved)
    assert read_table(moved / "copy.csv")["path"].tolist() == [str(moved / "a.nii"), str(moved / "b.nii")]


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + f"{HEADER}\r\na,0,a.nii,CN,70\r\n".encode())
    assert read_table(path)["subject"].tolist() == ["a"]


ROW = "a,0,a.nii,CN,70"
CELL_FAULTS = {
    "session": ("a,visit1,a.nii,CN,70", 3, "session", "M012"),
    "no session": ("a,,a.nii,CN,70", 3, "session", "M012"),
    "age": ("a,6,a.nii,CN,seventy", 3, "age", "seventy"),
    "negative age": ("a,6,a.nii,CN,-3", 3, "age", "-3"),
    "infinite age": ("a,6,a.nii,CN,inf", 3, "age", "inf"),
    "age in days": ("a,6,a.nii,CN,25550", 3, "age", "25550"),
    "scan": ("a,6,missing.nii,CN,70", 3, "path", "missing.nii"),
    "scan is a folder": ("a,6,.,CN,70", 3, "path", "no such file"),
    "no scan": ("a,6,,CN,70", 3, "path", "empty"),
    "subject": (",6,a.nii,CN,70", 3, "subject", "name"),
    "subject climbs": ("../x,6,a.nii,CN,70", 3, "subject", "name"),
    "duplicate": ("a,M000,b.nii,CN,70", 3, "session", "line 2"),
}


@pytest.mark.parametrize("name", CELL_FAULTS)
def test_a_wrong_cell_is_named(tmp_path: Path, name: str) -> None:
    row, line, column, what = CELL_FAULTS[name]
    text = message(write(tmp_path, ROW, row))
    assert f"line {line}, column '{column}'" in text
    assert what in text


@pytest.mark.parametrize("column", HEADER.split(","))
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    header = ",".join(name for name in HEADER.split(",") if name != column)
    text = message(write(tmp_path, "1,2,3,4", header=header))
    assert f"column '{column}'" in text
    assert "missing" in text


def test_splits_of_a_subject_must_agree(tmp_path: Path) -> None:
    header = f"{HEADER},split"
    path = write(tmp_path, f"{ROW},train", "b,0,a.nii,CN,70,", "a,6,b.nii,CN,70,test", header=header)
    text = message(path)
    assert "line 4, column 'split'" in text
    assert "'train' in line 2" in text
    assert "line 2, column 'split'" in message(write(tmp_path, f"{ROW},Training", header=header))
    assert "split" not in read_table(write(tmp_path, f"{ROW},", header=header))


def test_line_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    """Blank lines and cells of several lines are counted."""
    header = f"{HEADER},note"
    path = write(tmp_path, 'a,0,a.nii,CN,70,"two\nlines"', "", 'b,0,a.nii,CN,x,"two\nlines"', header=header)
    assert "line 5, column 'age'" in message(path)


def test_a_file_that_is_not_a_table_is_refused(tmp_path: Path) -> None:
    assert "no such table" in message(tmp_path / "none.csv")
    assert "CSV" in message(tmp_path)
    path = tmp_path / "scans.csv"
    for content in (b"", b"\n\n", b"   \n"):
        path.write_bytes(content)
        assert "empty" in message(path)
    path.write_bytes(b"\x1f\x8b\x08\x00\xff\xfe\x00\x81,\n\n")
    message(path)
    path.write_bytes(f'{HEADER}\n"a,0,a.nii,CN,70\n'.encode())
    assert "CSV" in message(path)
    assert "no rows" in message(write(tmp_path))
    assert "twice" in message(write(tmp_path, f"{ROW},1", header=f"{HEADER},age"))
    assert "line 2: 6 cells" in message(write(tmp_path, f"{ROW},1"))
    assert "line 2: 2 cells" in message(write(tmp_path, "a,0"))


def test_missing_scans_are_accepted_if_they_are_not_required(tmp_path: Path) -> None:
    path = write(tmp_path, "a,0,gone.nii,CN,70", scans=())
    assert "no such file" in message(path)
    assert read_table(path, require_files=False)["path"].tolist() == [str(tmp_path / "gone.nii")]


def test_columns_under_other_names_are_renamed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    header = "PTID;VISCODE;File;DX;AGE_AT_SCAN;PTGENDER;site"
    path = write(tmp_path, "7;bl;a.nii; ad;71,5;1;x", "8;m12;b.nii;AD;89+;2;x", "9;bl;b.nii;;n/a;1;y", header=header)
    table = read_table(path)
    assert list(table.columns) == [
        "subject", "session", "months", "path", "diagnosis", "age", "PTGENDER", "site", "sex"
    ]  # fmt: skip
    assert table["subject"].tolist() == ["7", "8", "9"]
    assert table["months"].tolist() == [0, 12, 0]
    assert table["diagnosis"].tolist() == ["AD", "AD", ""]
    assert table["age"].tolist()[:2] == [71.5, 89]
    assert table["sex"].tolist() == ["M", "F", "M"]
    assert "age: 2 of 3 (AGE_AT_SCAN): 2 by rule (71,5 as 71.5, 89+ as 89); 1 missing (n/a)" in caplog.text
    assert "diagnosis: 2 of 3 (DX): 1 missing" in caplog.text


def test_a_column_of_the_contract_is_taken_whatever_others_there_are(tmp_path: Path) -> None:
    path = write(tmp_path, "a,0,a.nii,CN,70,control,9", header=f"{HEADER},group,RID")
    table = read_table(path)
    assert table.iloc[0][["subject", "diagnosis", "group", "RID"]].tolist() == ["a", "CN", "control", 9]


def test_two_columns_of_one_kind_with_different_contents_are_refused(tmp_path: Path) -> None:
    header = "subject,session,path,DX,DX_bl,age"
    assert read_table(write(tmp_path, "a,0,a.nii,CN,cn,70", header=header))["diagnosis"].tolist() == ["CN"]
    text = message(write(tmp_path, "a,0,a.nii,CN,CN,70", "b,0,b.nii,AD,MCI,70", header=header))
    assert "line 3, column 'DX_bl': 'MCI', but column 'DX' has 'AD': rename the right one to 'diagnosis'" in text


def test_an_age_at_baseline_becomes_the_age_at_the_session(tmp_path: Path) -> None:
    path = write(tmp_path, "a,18,a.nii,CN,70", header="subject,session,path,diagnosis,age_bl")
    assert read_table(path)["age"].tolist() == [71.5]


@pytest.mark.parametrize(("ages", "said"), [((70, 70), True), ((70, 72), False)])
def test_one_age_at_visits_years_apart_is_said(tmp_path: Path, caplog, ages, said) -> None:
    rows = (f"a,0,a.nii,CN,{ages[0]}", f"a,24,b.nii,CN,{ages[1]}")
    read_table(write(tmp_path, *rows, header="subject,session,path,diagnosis,AGE"))
    assert ("1 of 1 subjects with visits years apart have the same age" in caplog.text) == said


def test_numbers_of_visits_are_not_months(tmp_path: Path) -> None:
    for number in ("2", "2.0"):
        path = write(tmp_path, f"a,{number},a.nii,CN,70", header="subject,visit,path,diagnosis,age")
        assert f"line 2, column 'visit': '{number}' may count visits: write months as M2" in message(path)


@pytest.mark.parametrize("spelling", ["sub-001", "1", "SUB-1"])
def test_two_spellings_of_one_person_are_refused(tmp_path: Path, spelling: str) -> None:
    text = message(write(tmp_path, "001,0,a.nii,CN,70", f"{spelling},12,b.nii,CN,71"))
    assert f"line 3, column 'subject': {spelling!r} and '001' in line 2 may be one person" in text


def test_missing_codes_are_counted_and_ambiguous_sexes_are_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    table = read_table(write(tmp_path, "a,0,a.nii,CN,-1,0", "b,0,b.nii,CN,999,1", header=f"{HEADER},sex"))
    assert table["age"].isna().all()
    assert table["sex"].tolist() == [0, 1]
    assert "age: 0 of 2 (age): 2 missing (-1, 999)" in caplog.text
    assert "sex: 0 of 2 (sex): 2 not understood ('0', '1')" in caplog.text
