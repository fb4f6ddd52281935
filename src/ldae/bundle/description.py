"""bundle.json, the description of a bundle: its keys, and reading it with every value checked for its kind."""

from pathlib import Path
from typing import Any

import numpy as np

from ldae.utils.errors import UserError
from ldae.utils.files import read_json
from ldae.utils.renamed import with_present_names

FORMAT = 1
MAX_BYTES = 2**20  # of bundle.json
DESCRIPTION, PROBES, DIRECTIONS = "bundle.json", "probes.json", "directions.json"
FORECAST = "forecast.safetensors"
NETWORKS = ("autoencoder", "encoder", "unet", "estimator")
OPTIONAL_NETWORKS = ("prior",)  # the semantic prior; format 1 of earlier versions had none
BUILT = ("transform", "schedule", "parameterisation", "sampler")  # keys of configs with `_target_`
# Measured on the training scans: attribute of a Bundle -> key in bundle.json and latents.json. Older bundles lack some.
MEASURED = {"ood_check": "likeness", "preprocess": "preprocess", "affine": "affine"}
OPTIONAL_FILES = ("probes", "directions", "forecast")
VIEW = "view"  # config of the semantic encoder's view (ldae.data.view); absent where it is the T1 volume


def read_description(folder: Path) -> dict[str, Any]:
    """Read bundle.json, with the present names of classes and arguments that have been renamed.

    Raises:
        UserError: it is missing, damaged or of another format, or a value is of the wrong kind.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        raise UserError(f"{folder} is no bundle: it has no {DESCRIPTION}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        description = read_json(path)
        version = description["format"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); export or import the bundle again") from error
    if version != FORMAT:
        raise UserError(f"{path}: format {version}, this version of ldae reads {FORMAT}; export the bundle again")
    _check_kinds(description, path)
    return with_present_names(description)


def _check_kinds(description: dict[str, Any], path: Path) -> None:
    """Refuse a description with a missing key or a value of the wrong kind."""
    missing = {"modules", "scale", "probes", "sources", *BUILT} - set(description)
    modules = description.get("modules")
    present = set(modules if isinstance(modules, dict) else ())
    missing |= set(NETWORKS) - present | present - {*NETWORKS, *OPTIONAL_NETWORKS}
    if missing:
        raise UserError(f"{path}: '{sorted(missing)[0]}' is missing or unknown; export or import the bundle again")
    files = [*modules.values(), *(description[name] for name in OPTIONAL_FILES if description.get(name))]
    scale = description["scale"] if isinstance(description["scale"], list) else [None]
    valid = (
        all(isinstance(entry, dict) for entry in files)
        and all(isinstance(entry.get(key), str) for entry in files for key in ("file", "sha256"))
        and all(_is_config(description[key]) for key in BUILT)
        and all(_is_config(entry.get("config")) for entry in modules.values())
        and isinstance(description.get("preprocess"), dict | None)
        and (description.get(VIEW) is None or _is_config(description[VIEW]))
        and _is_affine_or_none(description.get("affine"))
        and all(isinstance(number, int | float) and 0 < number < float("inf") for number in scale)
    )
    if not valid:
        raise UserError(f"{path} is damaged: a value is of the wrong kind; export or import the bundle again")


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def _is_affine_or_none(value: Any) -> bool:
    """Whether `value` is None or an invertible 4x4 matrix."""
    if value is None:
        return True
    try:
        matrix = np.array(value, dtype=np.float64)
        return matrix.shape == (4, 4) and 1e-6 < abs(np.linalg.det(matrix)) < 1e9
    except (TypeError, ValueError):
        return False
