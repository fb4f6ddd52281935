"""Finding the raw scans: in a BIDS dataset, in a Clinica CAPS tree, or in a CSV of paths.

Links are followed. Files and folders whose names start with a dot, such as the `._` copies that macOS makes, are not
scans.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from pathlib import Path

from ldae.data.columns import find_columns
from ldae.data.delimited import exists_or_refuse, read_text_table
from ldae.data.sessions import parse_bare_number, parse_date, parse_session, session_label
from ldae.preprocessing.bids_names import bids_entity, bids_label, path_entity, strip_suffix
from ldae.preprocessing.visit_numbers import numbers_count_visits
from ldae.utils.errors import UserError

NIFTI_SUFFIXES = (".nii.gz", ".nii")
CSV_ROLES = ("subject", "session", "path")


@dataclass(frozen=True)
class SourceScan:
    """One raw T1w scan.

    Attributes:
        path: the file.
        subject: "sub-...".
        session: "ses-...", or "" if the source has none.
        metadata: further columns of the CSV, such as age and sex.
        problem: reason why the scan cannot be used that is known without opening it, or "".
        date: when it was acquired, from scans.tsv, or None.
    """

    path: Path
    subject: str
    session: str
    metadata: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    date: datetime | None = None

    @property
    def printable_path(self) -> str:
        """The path as text that can be written."""
        return printable(str(self.path))


def printable(text: str) -> str:
    """Text of a file name in which bytes that are not UTF-8 are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def find_scans(source: Path) -> list[SourceScan]:
    """Find every T1w scan of `source`, sorted by subject and session.

    Raises:
        UserError: `source` does not exist or has no scan.
    """
    if source.is_file():
        scans = _find_in_csv(source)
    elif (source / "subjects").is_dir():
        scans = _find_in_caps(source / "subjects")
    elif source.is_dir():
        scans = _find_in_bids(source)
    else:
        raise UserError(f"no such folder or table: {source}")
    if not scans:
        raise UserError(f"no T1w scan in {source}: sub-*/[ses-*/]anat/*_T1w.nii.gz, or a CSV with a column `path`")
    return sorted(scans, key=lambda scan: (scan.subject, scan.session, str(scan.path)))


def _find_in_bids(root: Path) -> list[SourceScan]:
    dates = cache(_read_dates)  # scans of one folder share a table
    paths = _find_nifti_files(root, ("sub-*/anat", "sub-*/ses-*/anat"))
    return [replace(_describe_file(root, path), date=dates(path.parent.parent).get(path.name)) for path in paths]


def _find_in_caps(root: Path) -> list[SourceScan]:
    """Images of Clinica's t1-linear and t1-extensive; if an image exists with and without cropping, the whole one."""
    paths = list(_find_nifti_files(root, ("sub-*/ses-*/t1_linear", "sub-*/ses-*/t1_extensive")))
    names = {path.name for path in paths}
    return [_describe_file(root, path) for path in paths if not _is_cropped_copy(path.name, names)]


def _is_cropped_copy(name: str, names: set[str]) -> bool:
    return "_desc-Crop" in name and name.replace("_desc-Crop", "") in names


def _find_nifti_files(root: Path, folders: tuple[str, ...]) -> Iterator[Path]:
    for folder in folders:
        for end in NIFTI_SUFFIXES:
            yield from (path for path in root.glob(f"{folder}/*_T1w{end}") if not path.name.startswith("."))


def _describe_file(root: Path, path: Path) -> SourceScan:
    """Subject and session from the folders, or the session from the file's name if there is no folder for it."""
    folders = path.relative_to(root).parts[:-1]
    subject, session = folders[0], folders[1] if folders[1].startswith("ses-") else ""
    stated = bids_entity(path.name, "sub"), bids_entity(path.name, "ses")
    problem = ""
    if stated[0] and f"sub-{stated[0]}" != subject:
        problem = f"its folder is {subject}, but its name says sub-{stated[0]}: rename one of them"
    elif session and stated[1] and f"ses-{stated[1]}" != session:
        problem = f"its folder is {session}, but its name says ses-{stated[1]}: rename one of them"
    session = session or (f"ses-{stated[1]}" if stated[1] else "")
    if printable(str(path)) != str(path):
        problem = "its path is not UTF-8: rename the file or its folder"
    return SourceScan(path, printable(subject), printable(session), problem=problem)


def _read_dates(folder: Path) -> dict[str, datetime]:
    """Dates of acquisition by file name, from the sub-*_scans.tsv in the folder of a subject or session."""
    dates: dict[str, datetime] = {}
    for path in folder.glob("sub-*_scans.tsv"):
        if not exists_or_refuse(path):
            continue
        table = read_text_table(path)
        names, columns = find_columns(table.header, "path"), find_columns(table.header, "date")
        for row in table.rows if names and columns else []:
            date = parse_date(row.cells[columns[0]])
            if date:
                dates[os.path.basename(row.cells[names[0]])] = date
    return dates


def _find_in_csv(table: Path) -> list[SourceScan]:
    """Scans of the column `path` (relative to the table); subject and session from columns, or from the path."""
    content = read_text_table(table, "path")
    columns = {role: next(iter(find_columns(content.header, role)), "") for role in CSV_ROLES}
    if not columns["path"]:
        raise UserError(f"{table}: a column `path` is needed; the header has {', '.join(content.header) or 'nothing'}")
    scans, subject_by_label = [], {}
    counts_visits = numbers_count_visits(content, columns["subject"], columns["session"])
    for row in content.rows:
        found = {role: row.cells.get(name, "") for role, name in columns.items()}
        if not found["path"]:
            raise row.error(columns["path"], "it is empty")
        path = Path(found["path"]).expanduser()
        subject = found["subject"] or path_entity(path, "sub") or strip_suffix(path.name)
        label = bids_label(subject.removeprefix("sub-"))
        if not label or subject_by_label.setdefault(label, subject) != subject:
            raise UserError(
                f"{table}, line {row.line}: subject {subject!r} does not give a unique BIDS label; rename it"
            )
        session = found["session"] or path_entity(path, "ses")
        number = parse_bare_number(session) if counts_visits else None
        session = _format_session(session) if number is None else f"ses-{bids_label(session.split('.')[0])}"
        metadata = {name: cell for name, cell in row.cells.items() if name not in columns.values()}
        scans.append(SourceScan(table.parent / path, f"sub-{label}", session, metadata))
    return scans


def _format_session(text: str) -> str:
    """A BIDS session; months are written as in the table of training ("12" becomes ses-M012)."""
    try:
        return session_label(parse_session(text))
    except ValueError:
        label = bids_label(text.removeprefix("ses-"))
        return f"ses-{label}" if label else ""
