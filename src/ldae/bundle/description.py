"""bundle.json and what it describes, read as a stranger's: bounded in size, of known kinds, nothing from elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np

from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256, read_json
from ldae.utils.renamed import with_present_names

FORMAT = 1
MAX_DESCRIPTION = 2**20  # bytes
DESCRIPTION, PROBES, DIRECTIONS = "bundle.json", "probes.json", "directions.json"
DESCRIBED = ("transform", "schedule", "parameterisation", "sampler")
MEASURED = ("likeness", "preprocess", "affine")  # on the training scans; older bundles lack some
NETWORKS = ("autoencoder", "encoder", "unet", "estimator")


def read_description(folder: Path) -> dict[str, Any]:
    """bundle.json, checked.

    Raises:
        UserError: it is missing, damaged, of another format, or a value is of the wrong kind.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} is no bundle: it has no {DESCRIPTION}")
    try:
        if path.stat().st_size > MAX_DESCRIPTION:
            raise ValueError(f"{path.stat().st_size} bytes")
        about = read_json(path)
        version = about["format"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); export or import the bundle again") from error
    if version != FORMAT:
        raise UserError(f"{path}: format {version}, this version of ldae reads {FORMAT}; export the bundle again")
    _check_kinds(about, path)
    return with_present_names(about)


def _check_kinds(about: dict[str, Any], path: Path) -> None:
    """Everything is there, and of the kind that it should be."""
    missing = {"modules", "scale", "probes", "sources", *DESCRIBED} - set(about)
    modules = about.get("modules")
    missing |= set(NETWORKS) ^ set(modules if isinstance(modules, dict) else ())
    if missing:
        raise UserError(f"{path}: '{sorted(missing)[0]}' is missing or unknown; export or import the bundle again")
    entries = [*modules.values(), *(about[name] for name in ("probes", "directions") if about.get(name))]
    numbers = about["scale"] if isinstance(about["scale"], list) else [None]
    good = (
        all(isinstance(about[key], dict) and "_target_" in about[key] for key in DESCRIBED)
        and all(isinstance(entry, dict) for entry in entries)
        and all(isinstance(entry.get(key), str) for entry in entries for key in ("file", "sha256"))
        and all(isinstance(entry.get("config"), dict) and "_target_" in entry["config"] for entry in modules.values())
        and isinstance(about.get("preprocess"), dict | None)
        and _is_affine(about.get("affine"))
        and all(isinstance(number, int | float) and 0 < number < float("inf") for number in numbers)
    )
    if not good:
        raise UserError(f"{path} is damaged: a value is of the wrong kind; export or import the bundle again")


def _is_affine(value: Any) -> bool:
    """None, or four rows of four numbers that can be inverted."""
    if value is None:
        return True
    try:
        matrix = np.array(value, dtype=np.float64)
        return matrix.shape == (4, 4) and 1e-6 < abs(np.linalg.det(matrix)) < 1e9
    except (TypeError, ValueError):
        return False


def described_file(folder: Path, entry: dict[str, str]) -> Path:
    """A described file of the folder itself, unaltered."""
    path = folder / entry["file"]
    if entry["file"] != path.name or path.resolve().parent != folder.resolve():
        raise UserError(f"bundle {folder}: '{entry['file']}' lies elsewhere: a bundle holds its own files")
    if not path.is_file():
        raise UserError(f"bundle {folder}: '{path.name}' is missing")
    if file_sha256(path) != entry["sha256"]:
        raise UserError(f"bundle {folder}: '{path.name}' is not the file that was described; get it again")
    return path
