"""Region volumes from a label map, and which map belongs to which scan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldae.preprocessing.bids_names import bids_entity
from ldae.preprocessing.volume import Volume
from ldae.utils.errors import UserError


@dataclass(frozen=True)
class Regions:
    """What is counted in a label map.

    groups: name -> labels that are added up; each: a column for every label of the map as well.
    """

    groups: Mapping[str, Sequence[int]] = field(default_factory=dict)
    each: bool = True

    def volumes(self, labels: Volume) -> dict[str, float]:
        """Column -> mm3: `brain_mm3` (all labels), `<group>_mm3`, and `label_<number>_mm3`."""
        numbers, counts = np.unique(labels.data.round().astype(np.int64), return_counts=True)
        found = {int(n): float(count * labels.voxel_mm3) for n, count in zip(numbers, counts, strict=True) if n > 0}
        result = {"brain_mm3": sum(found.values())}
        for name, members in self.groups.items():
            result[f"{name}_mm3"] = sum(found.get(int(member), 0.0) for member in members)
        if self.each:
            result |= {f"label_{number:03d}_mm3": volume for number, volume in found.items()}
        return result


def find_label_maps(folder: Path) -> dict[tuple[str, str], Path]:
    """(subject, session) -> label map, of `sub-*[_ses-*]*_dseg.nii.gz` anywhere below `folder`.

    Raises:
        UserError: none there, or two of one session.
    """
    found: dict[tuple[str, str], Path] = {}
    for path in sorted((*folder.rglob("*_dseg.nii.gz"), *folder.rglob("*_dseg.nii"))):
        key = bids_entity(path.name, "sub"), bids_entity(path.name, "ses")
        if key in found:
            raise UserError(f"{folder} has two label maps of one session: {found[key]} and {path}; leave one")
        found[key] = path
    if not found:
        raise UserError(f"no label map *_dseg.nii.gz below {folder}")
    return found
