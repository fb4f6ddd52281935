"""Proves that a table is read whatever program wrote it, and that a file that is no table is refused in one line."""

import codecs
import os
from pathlib import Path

import pytest

from ldae.data.delimited import read_text_table
from ldae.utils.errors import UserError

ROWS = [{"participant_id": "sub-1", "age": "71.5"}, {"participant_id": "sub-2", "age": ""}]
TABLES = {
    "comma": b"participant_id,age\nsub-1,71.5\nsub-2,\n",
    "semicolon": b"participant_id;age\nsub-1;71.5\nsub-2;\n",
    "tab": b"participant_id\tage\nsub-1\t71.5\nsub-2\t\n",
    "spaces": b'participant_id  age\nsub-1   71.5  \nsub-2   ""\n',
    "UTF-8 with BOM": codecs.BOM_UTF8 + b"participant_id,age\r\nsub-1,71.5\r\nsub-2,\r\n",
    "UTF-16": "participant_id\tage\nsub-1\t71.5\nsub-2\t\n".encode("utf-16"),
    "UTF-16 without BOM": "participant_id\tage\nsub-1\t71.5\nsub-2\t\n".encode("utf-16-le"),
    "big-endian without BOM": "participant_id\tage\nsub-1\t71.5\nsub-2\t\n".encode("utf-16-be"),
    "old Macintosh": b"participant_id,age\rsub-1,71.5\rsub-2,\r",
    "spaces around": b" participant_id , age \n sub-1 , 71.5 \n sub-2 , \n",
    "blank lines": b"\n\nparticipant_id,age\n\nsub-1,71.5\n  \n,\nsub-2,\n\n",
    "quotes": b'"participant_id","age"\n"sub-1","71.5"\n"sub-2",""\n',
    "separator line": b"sep=;\nparticipant_id;age\nsub-1;71.5\nsub-2;\n",
    "empty columns at the end": b"participant_id,age,,\nsub-1,71.5,,\nsub-2,,\n",
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_any_program_have_the_same_cells(tmp_path: Path, name: str) -> None:
    path = tmp_path / "table"
    path.write_bytes(TABLES[name])
    assert [row.cells for row in read_text_table(path).rows] == ROWS


def test_the_header_alone_decides_on_the_separator(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    for text, cells in (
        ("id;age\n1;71,5\n", {"id": "1", "age": "71,5"}),
        ('"id, or name";age\n"a;b";3\n', {"id, or name": "a;b", "age": "3"}),
        ("path\nmy scans/a,b.nii\n", None),
        ("path\nmy scans/a.nii\n", {"path": "my scans/a.nii"}),
        ("id,site\n1,K\xf6ln\n", {"id": "1", "site": "K\xf6ln"}),
    ):
        path.write_bytes(text.encode("cp1252"))
        if cells:
            assert read_text_table(path).rows[0].cells == cells
        else:
            with pytest.raises(UserError, match="line 2: 2 cells, but the header has 1 column"):
                read_text_table(path)


def test_text_that_is_not_utf8_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes("id,site\n1,K\xf6ln\n".encode("cp1252"))
    read_text_table(path)
    assert "read as Windows-1252" in caplog.text


FAULTS = {
    "empty": (b"\n \n", "is empty"),
    "spreadsheet": (b"PK\x03\x04\x14\x00", "save it as CSV"),
    "binary": (b"a,b\n1,2\n\x00\x01,3\n", "line 3"),
    "no end of quotes": (b'a,b\n"1,2\n', "after line 1"),
    "twice": (b"a,b,a\n1,2,3\n", "column 'a': it appears twice"),
    "short row": (b"a,b\n1,2\n\n3\n", "line 4: 1 cells, but the header has 2 columns"),
    "long row": (b"a,b\n1,2,3\n", "line 2: 3 cells"),
    "git-annex pointer": (b"/annex/objects/MD5E-s12--abc.tsv\n", "git annex get table.tsv"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_is_no_table_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, what = FAULTS[name]
    path = tmp_path / "table.tsv"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_text_table(path)
    assert what in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dangling_link_is_named(tmp_path: Path) -> None:
    path = tmp_path / "participants.tsv"
    os.symlink(".git/annex/objects/x.tsv", path)
    with pytest.raises(UserError, match=r"dangling link to .*`git annex get participants.tsv` fetches it"):
        read_text_table(path)
    path.unlink()
    with pytest.raises(UserError, match="no such table"):
        read_text_table(path)
