"""Reading of text tables written by any program: separator, encoding and quotes are detected.

separator   the one of tab, semicolon and comma that divides the header into most cells; spaces if none of them does
encoding    UTF-8 or UTF-16 with or without a byte-order mark; text that is not UTF-8 is read as Windows-1252, which is
            logged
"""

import codecs
import csv
import io
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

SEPARATORS = "\t;,"  # if two divide the header alike, the earlier one is used
_SEPARATOR_LINE = re.compile(r"sep=(.)", re.IGNORECASE)  # first line of some spreadsheet programs
_BINARY = re.compile(r"[\x00-\x08\x0e-\x1f]")
_ANNEX = re.compile(rb"(?:\.\./)*/?(?:\.git/)?annex/objects/")


@dataclass(frozen=True)
class Row:
    """One record of a table, and its place.

    Attributes:
        table: the file.
        line: number of its first line.
        cells: text by column, without spaces around it.
    """

    table: Path
    line: int
    cells: dict[str, str]

    def error(self, column: str, what: str) -> UserError:
        """An error that names file, line and column."""
        return UserError(f"{self.table}, line {self.line}, column '{column}': {what}")


@dataclass(frozen=True)
class TextTable:
    """A table as text.

    Attributes:
        header: the names of the columns, without those at the end that have no name and no cell.
    """

    path: Path
    line: int  # of the header
    header: list[str]
    rows: list[Row]


def exists_or_refuse(path: Path) -> bool:
    """Whether a table exists that may be absent.

    Raises:
        UserError: it is a link whose file is missing.
    """
    if path.is_symlink() and not path.exists():
        target = os.readlink(path)
        remedy = f": `git annex get {path.name}` fetches it" if "annex/objects" in target else ""
        raise UserError(f"{path} is a dangling link to {target}{remedy or ': restore the file or remove the link'}")
    return path.exists()


def read_text_table(path: Path | str, needed: str = "") -> TextTable:
    """Read a table whose first record is the header.

    Args:
        needed: what the header should name, for the error of an empty file.

    Raises:
        UserError: the file is missing, empty, or not text, a column appears twice, or a row has too few or too many
            cells.
    """
    path = Path(path)
    records = list(read_cells(path))
    if not records:
        raise UserError(f"{path} is empty: a header{needed and f' with {needed}'} is needed")
    (line, header), *records = records
    width = max((number for number, name in enumerate(header, 1) if name), default=0)
    if not any(any(cells[width:]) for _, cells in records):
        header = header[:width]
    for name in header:
        if header.count(name) > 1:
            raise UserError(f"{path}, line {line}, column '{name}': it appears twice in the header")
    rows = []
    for number, cells in records:
        extra = cells[len(header) :]
        if len(cells) < len(header) or any(extra):
            raise UserError(f"{path}, line {number}: {len(cells)} cells, but the header has {len(header)} columns")
        rows.append(Row(path, number, dict(zip(header, cells[: len(header)], strict=True))))
    return TextTable(path, line, header, rows)


def read_cells(path: Path | str) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every non-blank record of a table.

    Raises:
        UserError: the file is missing, or is not a table in text.
    """
    text = _decode(Path(path), _read_bytes(Path(path)))
    skipped, separator = _detect_separator(text)
    lines = io.StringIO(text, newline="").readlines()[skipped:]
    if separator == " ":
        lines = [line.strip() + "\n" for line in lines]
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=separator == " ")
    line = skipped
    try:
        for cells in reader:
            # A quoted cell may span several lines: a record is numbered by its first line.
            line, start = skipped + reader.line_num, line + 1
            if any(cell.strip() for cell in cells):
                yield start, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise UserError(f"cannot read {path} as a CSV or TSV, after line {line}: {error}") from error


def _read_bytes(path: Path) -> bytes:
    if not exists_or_refuse(path):
        raise UserError(f"no such table: {path}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} as a CSV or TSV: {error.strerror}") from error
    if _ANNEX.match(content):
        raise UserError(f"{path} is a git-annex pointer without its content: `git annex get {path.name}` fetches it")
    if content.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer without its content: `git lfs pull` fetches it")
    if content.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise UserError(f"{path} is a spreadsheet file, not text: save it as CSV")
    return content


def _decode(path: Path, content: bytes) -> str:
    try:
        text = content.decode(_detect_encoding(content))
    except UnicodeError:
        try:
            text = content.decode("cp1252")
            log.warning("%s is not in UTF-8: read as Windows-1252", path)
        except UnicodeError as error:
            raise UserError(f"cannot read {path} as a CSV or TSV: it is not text in UTF-8 ({error.reason})") from error
    binary = _BINARY.search(text)
    if binary:
        line = text.count("\n", 0, binary.start()) + 1
        raise UserError(f"cannot read {path} as a CSV or TSV, line {line}: it has the control byte {binary[0]!r}")
    return text


def _detect_encoding(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    start = content[:400]
    for first, encoding in ((0, "utf-16-be"), (1, "utf-16-le")):  # a mostly Latin text has a zero in every other byte
        zeros, others = start[first::2], start[1 - first :: 2]
        if zeros and zeros.count(0) > 0.8 * len(zeros) and others.count(0) == 0:
            return encoding
    return "utf-8-sig"


def _detect_separator(text: str) -> tuple[int, str]:
    """Number of lines to skip, and the separator."""
    lines = text.splitlines()
    if lines and (match := _SEPARATOR_LINE.fullmatch(lines[0].strip(" "))):
        return 1, match[1]
    header = next((line for line in lines if line.strip()), "")
    best = max(SEPARATORS, key=lambda separator: len(next(csv.reader([header], delimiter=separator), [])))
    if best in header and len(next(csv.reader([header], delimiter=best))) > 1:
        return 0, best
    words = next(csv.reader([header.strip()], delimiter=" ", skipinitialspace=True), [])
    return 0, " " if len(words) > 1 else ","
