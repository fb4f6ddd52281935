"""Finding the raw scans: in a BIDS dataset, in a Clinica CAPS tree, or in a CSV of paths."""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from ldae.data.delimited import read_cells
from ldae.data.sessions import parse_session, session_label
from ldae.preprocessing.bids_names import bids_entity, bids_label
from ldae.utils.errors import UserError

NIFTI_SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class SourceScan:
    """One raw T1w scan.

    Attributes:
        path: the file.
        subject: "sub-...".
        session: "ses-...", or "" if the source has none.
        metadata: further columns of the CSV, such as age and sex.
        problem: reason why the scan cannot be used that is known without opening it, or "".
    """

    path: Path
    subject: str
    session: str
    metadata: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def find_scans(source: Path) -> list[SourceScan]:
    """Find every T1w scan of `source`, sorted by subject and session.

    If a session has several scans, all of them are returned with a `problem`.

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
    return _mark_duplicates(sorted(scans, key=lambda scan: (scan.subject, scan.session, str(scan.path))))


def _find_in_bids(root: Path) -> list[SourceScan]:
    return [_describe_file(path) for path in _find_nifti_files(root, ("sub-*/anat", "sub-*/ses-*/anat"))]


def _find_in_caps(root: Path) -> list[SourceScan]:
    """Images of Clinica's t1-linear and t1-extensive; if an image exists with and without cropping, the whole one."""
    paths = _find_nifti_files(root, ("sub-*/ses-*/t1_linear", "sub-*/ses-*/t1_extensive"))
    names = {path.name for path in paths}
    return [_describe_file(path) for path in paths if not _is_cropped_copy(path.name, names)]


def _is_cropped_copy(name: str, names: set[str]) -> bool:
    return "_desc-Crop" in name and name.replace("_desc-Crop", "") in names


def _find_nifti_files(root: Path, folders: tuple[str, ...]) -> list[Path]:
    return [path for folder in folders for end in NIFTI_SUFFIXES for path in root.glob(f"{folder}/*_T1w{end}")]


def _describe_file(path: Path) -> SourceScan:
    subject = next(part for part in path.parts[::-1] if part.startswith("sub-") and part != path.name)
    session = bids_entity(path.name, "ses")
    return SourceScan(path, subject, f"ses-{session}" if session else "")


def _find_in_csv(table: Path) -> list[SourceScan]:
    """Scans of the column `path` (relative to the table); subject and session from columns, or from the file's name."""
    records = read_cells(table)
    _, header = next(records, (0, []))
    if "path" not in header:
        raise UserError(f"{table}: a column `path` is needed; the header has {', '.join(header) or 'nothing'}")
    scans, subject_by_label = [], {}
    for line, cells in records:
        if len(cells) != len(header):
            raise UserError(f"{table}, line {line}: {len(cells)} cells, but the header has {len(header)} columns")
        metadata = dict(zip(header, cells, strict=True))
        path = Path(metadata.pop("path"))
        subject = metadata.pop("subject", "") or bids_entity(path.name, "sub") or path.name.split(".")[0]
        session = metadata.pop("session", "") or bids_entity(path.name, "ses")
        label = bids_label(subject.removeprefix("sub-"))
        if not label or subject_by_label.setdefault(label, subject) != subject:
            raise UserError(f"{table}, line {line}: subject {subject!r} does not give a unique BIDS label; rename it")
        scans.append(SourceScan(table.parent / path, f"sub-{label}", _format_session(session), metadata))
    return scans


def _format_session(text: str) -> str:
    """A BIDS session; months are written as in the table of training ("12" becomes ses-M012)."""
    try:
        return session_label(parse_session(text))
    except ValueError:
        label = bids_label(text.removeprefix("ses-"))
        return f"ses-{label}" if label else ""


def _mark_duplicates(scans: list[SourceScan]) -> list[SourceScan]:
    groups: dict[tuple[str, str], list[SourceScan]] = defaultdict(list)
    for scan in scans:
        groups[scan.subject, scan.session].append(scan)
    marked = []
    for group in groups.values():
        if len(group) > 1:
            names = ", ".join(scan.path.name for scan in group)
            problem = f"{len(group)} T1w scans in one session ({names}): name one in a CSV of paths"
            group = [replace(scan, problem=problem) for scan in group]
        marked += group
    return marked
