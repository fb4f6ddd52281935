"""Volumes of brain regions from label maps, and which label map belongs to which scan."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldae.data.sessions import parse_session, session_label
from ldae.preprocessing.bids_names import path_entity, strip_suffix
from ldae.preprocessing.sources import SourceScan
from ldae.preprocessing.volume import Volume
from ldae.utils.errors import UserError

ENDINGS = ("_dseg.nii.gz", "_dseg.nii")


@dataclass(frozen=True)
class Regions:
    """Which volumes are measured in a label map.

    Attributes:
        groups: name of a region -> the labels whose volumes are added.
        each: whether every label of the map gets a column of its own as well.
    """

    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    each: bool = True

    def volumes(self, labels: Volume) -> dict[str, float]:
        """Volumes in mm3 by column name: `brain_mm3` (all labels), `<group>_mm3` and `label_<number>_mm3`."""
        numbers, counts = np.unique(labels.data.round().astype(np.int64), return_counts=True)
        by_label = {int(n): float(count * labels.voxel_mm3) for n, count in zip(numbers, counts, strict=True) if n > 0}
        result = {"brain_mm3": sum(by_label.values())}
        for name, members in self.groups.items():
            result[f"{name}_mm3"] = sum(by_label.get(int(member), 0.0) for member in members)
        if self.each:
            result |= {f"label_{number:03d}_mm3": volume for number, volume in by_label.items()}
        return result


def find_label_maps(folder: Path) -> dict[tuple[str, str], Path]:
    """Find the label maps `sub-*[_ses-*]*_dseg.nii.gz` anywhere below `folder`, by (subject, session).

    Links to folders are followed. Subject and session may be named by a folder alone. Files whose names start with a
    dot are not label maps.

    Raises:
        UserError: there is none, or there are two for one session.
    """
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(_find_files(folder), key=lambda path: (not path.name.endswith(".gz"), path)):
        place = path.relative_to(folder)
        key = path_entity(place, "sub"), path_entity(place, "ses")
        other = found.setdefault(key, path)
        if other != path and (other.parent, strip_suffix(other.name)) != (path.parent, strip_suffix(path.name)):
            raise UserError(f"{folder} has two label maps of one session: {other} and {path}; leave one")
    if not found:
        raise UserError(f"no label map *_dseg.nii.gz below {folder}")
    return found


def label_map_of(scan: SourceScan, label_maps: Mapping[tuple[str, str], Path]) -> Path | None:
    """The label map of a scan's session, whose label may be written in another way (M12 for M012), or None."""
    subject, session = scan.subject.removeprefix("sub-"), scan.session.removeprefix("ses-")
    if (subject, session) in label_maps:
        return label_maps[subject, session]
    try:
        return label_maps.get((subject, session_label(parse_session(scan.session)).removeprefix("ses-")))
    except ValueError:
        return None


def _find_files(folder: Path) -> Iterator[Path]:
    visited: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in visited]
        if real not in visited:
            visited.add(real)  # links may form a circle
            named = (name for name in files if name.endswith(ENDINGS) and not name.startswith("."))
            yield from (Path(root, name) for name in named)
