"""Which T1w scan is used if a session has several: repeated runs, other acquisitions, reconstructions or copies.

A session's scans are sorted by acq-, rec- and run-, those without an entity first, or by the time in scans.tsv if it is
known for all of them. `first` takes the first one that is usable, `last` the last one, and `best` preprocesses all of
them and takes the one that correlates best with the template, or without registration the one with the least noise.
Sessions of a subject in one month are taken for one session, because the table of training counts in months.
"""

import gzip
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldae.preprocessing.bids_names import bids_entity, strip_suffix
from ldae.preprocessing.sources import SourceScan

CHUNK = 2**20  # bytes
Row = dict[str, Any]  # cells of the table of training that do not depend on preprocessing


@dataclass(frozen=True)
class RunChoice:
    """How one of several scans is chosen.

    Attributes:
        name: as on the command line.
        is_reversed: whether later scans come first.
        compares: whether all scans are preprocessed, and the best one is taken.
    """

    name: str
    is_reversed: bool = False
    compares: bool = False


FIRST, LAST, BEST = RunChoice("first"), RunChoice("last", is_reversed=True), RunChoice("best", compares=True)
CHOICES = {choice.name: choice for choice in (FIRST, LAST, BEST)}


@dataclass(frozen=True)
class SessionScans:
    """The T1w scans of one session.

    Attributes:
        scans: in the order in which they are tried.
        rows: of each scan, the cells of the table of training that do not depend on preprocessing.
        labels: label map on the grid of the raw scan, or None.
        left_out: scans that are not tried, each with the reason.
    """

    scans: tuple[SourceScan, ...]
    rows: tuple[Row, ...] = ({},)
    labels: Path | None = None
    left_out: tuple[tuple[SourceScan, str], ...] = ()

    @property
    def first(self) -> SourceScan:
        """The scan that is tried first."""
        return self.scans[0]


def group_scans(
    scans: Sequence[SourceScan],
    rows: Sequence[Row],
    choice: RunChoice,
    find_labels: Callable[[SourceScan], Path | None],
) -> list[SessionScans]:
    """Group usable scans by subject and month, `rows[i]["session"]`; the groups are sorted by subject and month."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, scan in enumerate(scans):
        groups[scan.subject, rows[index]["session"]].append(index)
    found = []
    for _, group in sorted(groups.items()):
        kept, copies = _drop_copies([scans[index] for index in _sorted_group(scans, group, choice)])
        cells = {scans[index].path: rows[index] for index in group}
        ordered = tuple(cells[scan.path] for scan in kept)
        found.append(SessionScans(tuple(kept), ordered, find_labels(kept[0]), tuple(copies)))
    return found


def quality(measures: dict[str, float]) -> float:
    """The quality of a preprocessed scan, higher is better: correlation with the template, or else less noise."""
    value = measures.get("template_correlation", -measures.get("noise", math.inf))
    return value if math.isfinite(value) else -math.inf


def describe_choice(taken: SourceScan, other: SourceScan, choice: RunChoice) -> str:
    """Reason why `other` was not taken."""
    where = "session" if taken.session == other.session else f"month ({other.session} and {taken.session})"
    name = taken.printable_path if taken.path.name == other.path.name else taken.path.name
    return f"not taken: {name} is the {choice.name} T1w scan of this {where} (--run {choice.name})"


def _sorted_group(scans: Sequence[SourceScan], group: Iterable[int], choice: RunChoice) -> list[int]:
    group = sorted(group, key=lambda index: _name_key(scans[index]))
    dates = [scans[index].date for index in group]
    if all(dates):
        group = [index for _, index in sorted(zip(dates, group, strict=True), key=lambda pair: pair[0])]
    return group[::-1] if choice.is_reversed else group


def _name_key(scan: SourceScan) -> tuple[Any, ...]:
    """Sorts scans of a session: raw ones before derived ones, then by entities, numbers by their value."""
    name = scan.path.name
    is_derived = bool(bids_entity(name, "space") or bids_entity(name, "desc"))
    entities = [_natural_key(bids_entity(name, key)) for key in ("acq", "rec", "run")]
    return is_derived, _natural_key(scan.session), *entities, not name.endswith(".nii.gz"), str(scan.path)


def _natural_key(text: str) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", text.lower())
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


def _drop_copies(scans: list[SourceScan]) -> tuple[list[SourceScan], list[tuple[SourceScan, str]]]:
    """Remove `.nii` files with the same bytes as the `.nii.gz` of the same name, and files that are listed twice."""
    kept: list[SourceScan] = []
    copies: list[tuple[SourceScan, str]] = []
    for scan in sorted(scans, key=lambda scan: not scan.path.name.endswith(".nii.gz")):
        twin = next((other for other in kept if _is_copy(scan.path, other.path)), None)
        if twin is None:
            kept.append(scan)
        else:
            copies.append((scan, f"not taken: it has the same voxels as {twin.path.name}"))
    return [scan for scan in scans if any(scan is other for other in kept)], copies


def _is_copy(path: Path, other: Path) -> bool:
    if path == other:
        return True
    if path.parent != other.parent or strip_suffix(path.name) != strip_suffix(other.name):
        return False
    try:
        with _open(path) as first, _open(other) as second:
            while (chunk := first.read(CHUNK)) == second.read(CHUNK):
                if not chunk:
                    return True
    except (OSError, EOFError, zlib.error):
        pass  # a damaged copy is tried as a scan of its own
    return False


def _open(path: Path) -> Any:
    return gzip.open(path) if path.name.endswith(".gz") else open(path, "rb")
