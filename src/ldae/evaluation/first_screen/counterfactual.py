"""One edited scan at every alpha, with the volumes that were measured in it: what the slider of the first screen shows.

The images are those of the stored viewer, manipulation_<label>_1.html; the volumes are those of
manipulation_<label>.csv, and the words for alpha those of directions.json.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ldae.evaluation.first_screen.names import find_edited
from ldae.evaluation.first_screen.pictures import draw_pictures
from ldae.utils.files import read_json
from ldae.utils.html_viewer import StoredViewer, read_viewer

log = logging.getLogger(__name__)

STRUCTURES = {
    "ventricle": "ventricles",
    "hippocampus": "hippocampi",
    "amygdala": "amygdalae",
    "inferior_lateral_ventricle": "inferior lateral ventricles",
}


@dataclass(frozen=True)
class Structure:
    """Volumes of one structure.

    Attributes:
        volumes: mm3 at each alpha.
        true_changes: percent at each alpha in the true counterfactual; None where it is not known.
    """

    name: str
    volumes: Sequence[float]
    true_changes: Sequence[float] | None = None

    def changes(self, unedited: int) -> list[float]:
        """Change in percent of the volume at alpha number `unedited`."""
        return [100 * (volume / self.volumes[unedited] - 1) for volume in self.volumes]


@dataclass(frozen=True)
class Counterfactual:
    """A scan edited along one label.

    Attributes:
        label, scan: names of them.
        meaning: of alpha = 1, in words; "" if it is not known.
        towards: what alpha < 0 and alpha > 0 go towards.
        alphas: ascending, 0 among them.
        pictures: the scan and, below, its change, as PNG, one for each alpha.
        limit: change that has the full colour, percent of the intensity range.
    """

    label: str
    scan: str
    meaning: str
    towards: tuple[str, str]
    alphas: Sequence[float]
    pictures: Sequence[bytes]
    limit: float
    structures: Sequence[Structure]

    @property
    def unedited(self) -> int:
        """Number of alpha = 0."""
        return list(self.alphas).index(0.0)


def find_counterfactual(folder: Path, files: Sequence[str], metrics: Mapping[str, float]) -> Counterfactual | None:
    """The edit that the first screen shows: of the diagnosis, else of age, else the first; None if there is none.

    Args:
        files: names of the files in `folder` that belong to the present results.
    """
    labels = find_edited(metrics) or [match[1] for name in files if (match := re.fullmatch(VIEWER, name))]
    for label in labels:
        name = f"manipulation_{label}_1.html"
        viewer = read_viewer(folder / name) if name in files else None
        alphas = None if viewer is None else _read_alphas(viewer)
        if viewer is not None and alphas is not None and 0.0 in alphas and len(set(alphas)) > 1:
            return _build(folder, files, label, viewer, alphas, metrics)
    return None


VIEWER = r"manipulation_(.+)_1\.html"


def _read_alphas(viewer: StoredViewer) -> list[float] | None:
    matches = [re.fullmatch(r"alpha = ([+-]?\d+(?:\.\d+)?)", label) for label in viewer.frames]
    return [float(match[1]) for match in matches if match] if all(matches) else None


def _build(
    folder: Path, files: Sequence[str], label: str, viewer: StoredViewer, alphas: list[float],
    metrics: Mapping[str, float],
) -> Counterfactual:  # fmt: skip
    pictures, limit = draw_pictures(list(viewer.frames.values()), alphas.index(0.0))
    meaning, towards = _read_words(folder, label) if "directions.json" in files else ("", ("less", "more"))
    scan = viewer.title.split(":")[0]
    table = f"manipulation_{label}.csv"
    structures = _read_structures(folder, label, scan, alphas, metrics) if table in files else []
    return Counterfactual(label, scan, meaning, towards, alphas, pictures, limit, structures)


def _read_words(folder: Path, label: str) -> tuple[str, tuple[str, str]]:
    """The meaning of alpha = 1, and what the two ends are."""
    try:
        stored = read_json(folder / "directions.json")["directions"][label]
        calibration, alpha = stored.get("calibration") or {}, stored.get("alpha") or {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("directions.json has no words for %s: %s", label, error)
        return "", ("less", "more")
    classes = calibration.get("classes")
    ends = (
        (str(classes[0]), str(classes[1])) if classes else ("younger", "older") if label == "age" else ("less", "more")
    )
    return str(alpha.get("meaning", "")), ends


def _read_structures(
    folder: Path, label: str, scan: str, alphas: Sequence[float], metrics: Mapping[str, float]
) -> list[Structure]:
    """The measured volumes of the scan of this name, `<subject> <session>`."""
    table = pd.read_csv(folder / f"manipulation_{label}.csv", dtype={"subject": str, "session": str})
    own = table[table["subject"] + " " + table["session"] == scan].drop_duplicates("alpha").set_index("alpha")
    if not set(alphas) <= set(own.index):
        return []
    found = []
    for name, words in STRUCTURES.items():
        if f"{name}_mm3" in own:
            volumes = own.loc[list(alphas), f"{name}_mm3"].tolist()
            unedited = volumes[list(alphas).index(0.0)]
            if np.isfinite(volumes).all() and unedited > 0:
                slope = _read_true_slope(folder, label, scan, name, metrics)
                true = None if slope is None else [100 * alpha * slope / unedited for alpha in alphas]
                found.append(Structure(words, volumes, true))
    return found


def _read_true_slope(folder: Path, label: str, scan: str, structure: str, metrics: Mapping[str, float]) -> float | None:
    """What alpha = 1 truly changes in a phantom, mm3; None if it is not known."""
    expected, path = (
        metrics.get(f"manipulation/{label}/factor_per_alpha_expected"),
        folder / f"manipulation_{label}_scans.csv",
    )
    if expected is None or not path.is_file():
        return None
    table = pd.read_csv(path, dtype={"subject": str, "session": str})
    own = table[table["subject"] + " " + table["session"] == scan]
    column = f"true_{structure}"
    return expected * float(own[column].iloc[0]) if column in own and len(own) else None
