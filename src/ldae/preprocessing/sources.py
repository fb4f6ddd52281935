"""Which scans there are: in a BIDS dataset, in a Clinica CAPS tree, or in a CSV of paths."""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from ldae.data.table import parse_session, read_cells, session_label
from ldae.preprocessing.bids_names import bids_entity, bids_label
from ldae.utils.errors import UserError

NIFTI = (".nii.gz", ".nii")


@dataclass(frozen=True)
class SourceScan:
    """One raw T1w scan. subject: "sub-..."; session: "ses-..." or "" where the source has none."""

    path: Path
    subject: str
    session: str
    metadata: dict[str, str] = field(default_factory=dict)  # what the source itself says: age, sex, ...
    problem: str = ""  # why it cannot be used, known without opening it


def find_scans(source: Path) -> list[SourceScan]:
    """Every T1w scan of `source`, by subject and session.

    Two scans of one session are both there, with a `problem`.

    Raises:
        UserError: no such place, or no scan in it.
    """
    if source.is_file():
        scans = _from_csv(source)
    elif (source / "subjects").is_dir():
        scans = _from_caps(source / "subjects")
    elif source.is_dir():
        scans = _from_bids(source)
    else:
        raise UserError(f"no such folder or table: {source}")
    if not scans:
        raise UserError(f"no T1w scan in {source}: sub-*/[ses-*/]anat/*_T1w.nii.gz, or a CSV with a column `path`")
    return _mark_doubles(sorted(scans, key=lambda scan: (scan.subject, scan.session, str(scan.path))))


def _from_bids(root: Path) -> list[SourceScan]:
    return [_scan(path) for path in _niftis(root, ("sub-*/anat", "sub-*/ses-*/anat"))]


def _from_caps(root: Path) -> list[SourceScan]:
    """Clinica's t1-linear and t1-extensive images; of an image with and without cropping, the whole one."""
    paths = _niftis(root, ("sub-*/ses-*/t1_linear", "sub-*/ses-*/t1_extensive"))
    names = {path.name for path in paths}
    return [_scan(path) for path in paths if not _cropped_twin(path.name, names)]


def _cropped_twin(name: str, names: set[str]) -> bool:
    return "_desc-Crop" in name and name.replace("_desc-Crop", "") in names


def _niftis(root: Path, folders: tuple[str, ...]) -> list[Path]:
    return [path for folder in folders for end in NIFTI for path in root.glob(f"{folder}/*_T1w{end}")]


def _scan(path: Path) -> SourceScan:
    subject = next(part for part in path.parts[::-1] if part.startswith("sub-") and part != path.name)
    session = bids_entity(path.name, "ses")
    return SourceScan(path, subject, f"ses-{session}" if session else "")


def _from_csv(table: Path) -> list[SourceScan]:
    """Column `path` (relative to the table); subject and session by columns, else by the file's name."""
    records = read_cells(table)
    _, header = next(records, (0, []))
    if "path" not in header:
        raise UserError(f"{table}: a column `path` is needed; the header has {', '.join(header) or 'nothing'}")
    scans, names = [], {}
    for line, cells in records:
        if len(cells) != len(header):
            raise UserError(f"{table}, line {line}: {len(cells)} cells, but the header has {len(header)} columns")
        about = dict(zip(header, cells, strict=True))
        path = Path(about.pop("path"))
        subject = about.pop("subject", "") or bids_entity(path.name, "sub") or path.name.split(".")[0]
        session = about.pop("session", "") or bids_entity(path.name, "ses")
        name = bids_label(subject.removeprefix("sub-"))
        if not name or names.setdefault(name, subject) != subject:
            raise UserError(f"{table}, line {line}: subject {subject!r} gives no file name of its own; rename it")
        scans.append(SourceScan(table.parent / path, f"sub-{name}", _session(session), about))
    return scans


def _session(text: str) -> str:
    """A BIDS session; months as in every table of ours ("12" is ses-M012)."""
    try:
        return session_label(parse_session(text))
    except ValueError:
        name = bids_label(text.removeprefix("ses-"))
        return f"ses-{name}" if name else ""


def _mark_doubles(scans: list[SourceScan]) -> list[SourceScan]:
    groups: dict[tuple[str, str], list[SourceScan]] = defaultdict(list)
    for scan in scans:
        groups[scan.subject, scan.session].append(scan)
    marked = []
    for group in groups.values():
        if len(group) == 1:
            marked += group
            continue
        names = ", ".join(scan.path.name for scan in group)
        problem = f"{len(group)} T1w scans in one session ({names}): name one in a CSV of paths"
        marked += [SourceScan(scan.path, scan.subject, scan.session, scan.metadata, problem) for scan in group]
    return marked
