"""Proves that participants are matched with scans by subject and session, and what their tables are read as."""

import math
from pathlib import Path

import pytest

from ldae.preprocessing.participants import Columns, Participant, Participants
from ldae.preprocessing.sources import SourceScan
from ldae.utils.errors import UserError


def scans_of(*names: str) -> list[SourceScan]:
    """Scans named sub-X or sub-X/ses-Y."""
    return [SourceScan(Path(name), *name.split("/")[:2], *[""] * ("/" not in name)) for name in names]


def look_up(folder: Path, table: str, *names: str, columns: Columns | None = None) -> list[Participant]:
    """Participants of the scans; spaces in the table stand for tabs."""
    (folder / "participants.tsv").write_text(table.replace(" ", "\t"), encoding="utf-8")
    return Participants(folder, columns or Columns()).look_up_all(scans_of(*names))


def values(found: list[Participant]) -> list[tuple]:
    return [(one.age if math.isfinite(one.age) else None, one.sex, one.diagnosis) for one in found]


def test_columns_and_subjects_are_found_in_the_ways_of_writing_them(tmp_path: Path) -> None:
    table = "Subject Age Gender Group\n1 60 male ad\n2 89+ F AD\nA03 60-64 n/a  CN\n"
    found = look_up(tmp_path, table.replace("  ", " "), "sub-001", "sub-002", "sub-a3", "sub-9")
    assert values(found) == [(60, "M", "AD"), (89, "F", "AD"), (62, "", "CN"), (None, "", "")]


@pytest.mark.parametrize("columns", [Columns(), Columns(subject=["id"])])
def test_subjects_may_have_the_numbers_that_are_codes_elsewhere(tmp_path: Path, columns: Columns) -> None:
    table = "id age\n888 60\n999 999\nn/a 70\n"
    assert values(look_up(tmp_path, table, "sub-888", "sub-999", columns=columns)) == [(60, "", ""), (None, "", "")]


def test_rows_of_a_participant_are_matched_by_session(tmp_path: Path) -> None:
    table = "participant_id session_id age diagnosis\nsub-1 ses-M000 70 CN\nsub-1 ses-M024 72 AD\nsub-2 M12 60 AD\n"
    found = look_up(tmp_path, table, "sub-1/ses-M000", "sub-1/ses-M024", "sub-1/ses-M012", "sub-2/ses-M00")
    assert values(found) == [(70, "", "CN"), (72, "", "AD"), (71, "", ""), (59, "", "")]


def test_a_scan_without_a_session_has_the_row_of_the_first_one(tmp_path: Path) -> None:
    table = "PTID VISCODE DX\n1 m12 AD\n1 bl CN\n"
    assert values(look_up(tmp_path, table, "sub-1")) == [(None, "", "CN")]


def test_two_different_rows_for_one_scan_are_refused(tmp_path: Path) -> None:
    table = "participant_id age\nsub-1 70\nsub-2 60\n1 72\n"
    with pytest.raises(UserError, match="line 4: a second row fits sub-1, with other values than line 2"):
        look_up(tmp_path, table, "sub-1", "sub-2")
    assert values(look_up(tmp_path, table, "sub-2")) == [(60, "", "")]
    assert values(look_up(tmp_path, "participant_id age\nsub-1 70\n1 70.0\n", "sub-1")) == [(70, "", "")]


def test_one_age_for_sessions_years_apart_is_that_at_the_first(tmp_path: Path) -> None:
    table = (
        "participant_id session_id AGE\nsub-1 ses-M000 70\nsub-1 ses-M024 70\nsub-2 ses-M000 70\nsub-2 ses-M012 70\n"
    )
    names = ("sub-1/ses-M000", "sub-1/ses-M024", "sub-2/ses-M000", "sub-2/ses-M012")
    assert [one.age for one in look_up(tmp_path, table, *names)] == [70, 72, 70, 70]


def test_two_columns_of_one_kind_need_a_choice(tmp_path: Path) -> None:
    table = "participant_id DX DX_bl\nsub-1 AD MCI\n"
    with pytest.raises(UserError, match=r"line 2, column 'DX_bl'.*--set preprocess.columns.diagnosis=\[DX\]"):
        look_up(tmp_path, table, "sub-1")
    for name, diagnosis in (("DX", "AD"), ("dx_bl", "MCI")):
        assert look_up(tmp_path, table, "sub-1", columns=Columns(diagnosis=[name]))[0].diagnosis == diagnosis


def test_codes_of_the_sex_are_read_if_they_are_certain_or_stated(tmp_path: Path) -> None:
    names = ("sub-1", "sub-2")
    codes = {"1 2": ("M", "F"), "0 1": ("", ""), "1 1": ("", "")}
    for cells, sexes in codes.items():
        first, second = cells.split()
        table = f"participant_id sex\nsub-1 {first}\nsub-2 {second}\n"
        assert tuple(one.sex for one in look_up(tmp_path, table, *names)) == sexes
    stated = Columns(sex_codes={0: "F", 1: "M"})
    found = look_up(tmp_path, "participant_id sex\nsub-1 0\nsub-2 1.0\n", *names, columns=stated)
    assert [one.sex for one in found] == ["F", "M"]
    with pytest.raises(UserError, match="sex_codes: 0: x"):
        Columns(sex_codes={0: "x"})


def test_a_line_for_each_column_says_how_many_values_were_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    table = "participant_id age sex weight\nsub-1 70 0 9\nsub-2 -1 1 9\nsub-3 seventy n/a 9\nsub-4 071Y F 9\n"
    look_up(tmp_path, table, "sub-1", "sub-2", "sub-3", "sub-4", "sub-5")
    assert f"subject: 4 of 5 in {tmp_path / 'participants.tsv'}" in caplog.messages
    assert "age: 2 of 5 (age): 1 by rule (071Y as 71); 2 missing (-1); 1 not understood ('seventy')" in caplog.messages
    assert "sex: 1 of 5 (sex): 2 missing (n/a); 2 not understood ('0', '1')" in caplog.messages
    assert "diagnosis: 0 of 5; the table has weight" in caplog.messages


def test_tables_that_give_nothing_are_a_reason(tmp_path: Path) -> None:
    def reason(table: str | None) -> str | None:
        path = tmp_path / "participants.tsv"
        path.unlink(missing_ok=True)
        if table:
            path.write_text(table.replace(" ", "\t"), encoding="utf-8")
        participants = Participants(tmp_path, Columns())
        participants.look_up_all(scans_of("sub-1"))
        return participants.reason_empty

    assert "none of its 1 participants (7, ...) is a subject of the scans (sub-1, ...)" in reason("id age\n7 70\n")
    assert "age: 0 of 1; the table has AgeMRI" in reason("id AgeMRI\n1 70\n")
    assert "age: 0 of 1 (age): 1 missing (n/a)" in reason("id age\n1 n/a\n")
    assert reason("id age\n1 70\n") is None
    assert reason("id sex\n1 M\n") is None  # it states neither age nor diagnosis
    assert reason(None) is None


def test_a_table_without_subjects_and_a_dangling_link_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "participants.tsv"
    path.write_text("name\tage\nx\t70\n")
    with pytest.raises(UserError, match="no column of subjects in name, age"):
        Participants(tmp_path, Columns())
    path.unlink()
    path.symlink_to("nowhere.tsv")
    with pytest.raises(UserError, match="dangling link"):
        Participants(tmp_path, Columns())
    with pytest.raises(UserError, match="no such file"):
        Participants(tmp_path, Columns(), tmp_path / "other.tsv")
