"""Proves which columns are found under which names, what their cells are read as, and which subjects are one person."""

import math
from pathlib import Path

import pytest

from ldae.data.columns import ColumnReport, find_columns, find_similar_columns, select_cell
from ldae.data.delimited import Row
from ldae.data.subjects import SubjectIndex, subject_key
from ldae.data.values import find_sex_codes, parse_age, parse_diagnosis, parse_sex, unify_case
from ldae.utils.errors import UserError


@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("subject", "participant_id subject Subject_ID PTID RID eid sub"),
        ("session", "session session_id Visit VISCODE VISCODE2 timepoint"),
        ("age", "age Age AGE_AT_SCAN age_at_visit AgeAtScan"),
        ("baseline_age", "age_bl AGE-BL"),
        ("sex", "sex Gender PTGENDER M/F"),
        ("diagnosis", "diagnosis Group DX DX_bl DX.bl"),
    ],
)
def test_columns_are_found_whatever_their_case(role: str, names: str) -> None:
    for name in names.split():
        assert find_columns(["other", name], role) == [name]
        assert find_similar_columns(["other", name], role) == []


def test_names_with_a_unit_are_named_but_not_taken() -> None:
    header = ["participant_id", "Age (years)", "image", "stage", "AgeYrs"]
    assert find_columns(header, "age") == []
    assert find_similar_columns(header, "age") == ["Age (years)", "AgeYrs"]
    report = ColumnReport("age", [], header[:2])
    for _ in range(149):
        report.add("", "")
    assert report.describe() == "age: 0 of 149; the table has Age (years)"


def test_the_column_that_a_standard_prescribes_is_the_only_one() -> None:
    assert find_columns(["RID", "participant_id", "id"], "subject") == ["participant_id"]
    assert find_columns(["RID", "PTID"], "subject") == ["PTID", "RID"]
    assert find_columns(["RID", "PTID"], "subject", names=["rid"]) == ["RID"]


def test_two_columns_with_different_contents_are_refused() -> None:
    row = Row(Path("t.csv"), 7, {"DX": "AD", "DX_bl": "MCI", "group": "ad", "dx": "", "note": "n/a"})
    assert select_cell(row, ["dx", "note", "DX", "group"], parse_diagnosis, "") == "AD"
    with pytest.raises(UserError, match="line 7, column 'DX_bl': 'MCI', but column 'DX' has 'AD': choose"):
        select_cell(row, ["DX", "DX_bl"], parse_diagnosis, "choose")


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("71.5", 71.5), ("71,5", 71.5), ("89+", 89), (">=90", 90), ("60-64", 62), ("60 to 65", 62.5), ("065Y", 65),
        ("780M", 65), ("65.0 years", 65), ("65 y", 65), ("65yrs", 65), ("780 months", 65), ("23725D", 64.9555),
        ("0", 0),
    ],
)  # fmt: skip
def test_ages_are_read_by_rules(text: str, years: float) -> None:
    assert parse_age(text).years == pytest.approx(years, abs=1e-4)
    assert parse_age(text).is_plain == (text in ("71.5", "0"))


def test_missing_ages_and_texts_that_are_no_ages() -> None:
    for text in ("", "n/a", "NaN", "-1", "-9", "-4.0", "999", "9999", ".", "?", "unknown", "None"):
        assert math.isnan(parse_age(text).years)
    for text in ("seventy", "25550", "1950", "-3", "inf", "1e999", "60-95", "64-60", "65 parrots", "1950-01-31"):
        with pytest.raises(ValueError, match="not an age"):
            parse_age(text)


def test_numbers_are_sexes_only_if_their_meaning_is_certain() -> None:
    iso = find_sex_codes(["1", "2.0", "n/a", "999"])
    assert [parse_sex(text, iso) for text in ("1", "1.0", "2", "n/a")] == ["M", "M", "F", ""]
    for column in (["0", "1"], ["1", "1"], ["0", "1", "2"], ["1", "2", "3"]):
        assert find_sex_codes(column) == {}
    words = {"M": "M", "male": "M", " Female ": "F", "f": "F", "other": "O", "": "", "unknown": ""}
    assert [parse_sex(text, {}) for text in words] == list(words.values())
    assert [parse_sex(text, {0.0: "F", 1.0: "M"}) for text in ("0", "1.0")] == ["F", "M"]
    for text in ("0", "1", "x"):
        with pytest.raises(ValueError, match="write M or F"):
            parse_sex(text, {})


def test_diagnoses_lose_spaces_and_differences_of_case() -> None:
    texts = [" AD ", "ad", "AD", "Mild  impairment", "n/a", "-4"]
    assert unify_case([parse_diagnosis(text) for text in texts]) == ["AD"] * 3 + ["Mild impairment", "", ""]
    assert unify_case(["cn", "CN", "ad"]) == ["CN", "CN", "ad"]


def test_subjects_are_found_without_prefix_case_and_padding() -> None:
    assert len({subject_key(text) for text in ("sub-001", "SUB-001", "001", "1", " 1.0 ")}) == 1
    assert len({subject_key(text) for text in ("1-11", "11-1", "1_11", "s1", "s01")}) == 5
    for label, subject in (("sub-001", "1"), ("sub-1", "001"), ("sub-A01", "a01"), ("sub-011S0004", "011_S_0004")):
        assert SubjectIndex([subject, "other"], "t").find(label) == [subject]
    assert SubjectIndex(["1", "01"], "t").find("sub-01") == ["01"]
    assert SubjectIndex(["001", "sub-001"], "t").find("sub-001") == ["001", "sub-001"]  # one person
    assert SubjectIndex(["2"], "t").find("sub-1") == []
    with pytest.raises(UserError, match="t: sub-001 may be '1' and '01'"):
        SubjectIndex(["1", "01"], "t").find("sub-001")
    with pytest.raises(UserError, match="'1' may be sub-01 or sub-001"):
        SubjectIndex(["1"], "t").refuse_shared(["sub-01", "sub-001"])
