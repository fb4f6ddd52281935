"""Volumes of brain regions from label maps, and which label map belongs to which scan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ldae.preprocessing.bids_names import bids_entity
from ldae.preprocessing.volume import Volume
from ldae.utils.errors import UserError


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

    Raises:
        UserError: there is none, or there are two for one session.
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
