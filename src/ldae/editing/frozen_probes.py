"""probes.json: the fitted linear probes of an evaluation (evaluation=probes), for other cohorts and for edits."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldae.editing.linear_model import LinearModel
from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256, read_json, replacing, write_json

EMBEDDING = "embedding"  # name of the predictor that reads y; the others are baselines
INLINE = 4096  # features of a predictor whose arrays are still written into the JSON file
ARRAYS = ("mean", "std", "coef")


@dataclass(frozen=True)
class FrozenProbe:
    """A fitted predictor and the table columns that it reads (none for embeddings and latents)."""

    columns: list[str]
    model: LinearModel


def write_frozen_probes(path: Path, probes: Mapping[str, Mapping[str, FrozenProbe]], weights: str) -> None:
    """Write {"weights": hash, "probes": {probe: {predictor: its arrays}}} as JSON.

    The arrays of predictors of whole scans (more than `INLINE` features) are stored beside it, in `<stem>_scans.npz`;
    the JSON file has the SHA-256 of that.

    Args:
        probes: probe name -> predictor name -> predictor.
        weights: hash of the networks whose embeddings the probes were fitted on.
    """
    stored: dict[str, dict[str, dict[str, Any]]] = {}
    wide: dict[str, np.ndarray] = {}
    for probe, predictors in probes.items():
        stored[probe] = {}
        for name, entry in predictors.items():
            values = {"columns": entry.columns, **entry.model.to_dict()}
            if len(entry.model.mean) > INLINE:
                for array in ARRAYS:
                    wide[f"{probe}/{name}/{array}"] = getattr(entry.model, array)
                    values[array] = None
            stored[probe][name] = values
    content = {"weights": weights, "probes": stored}
    if wide:
        with replacing(_wide_file(path)) as temporary, open(temporary, "wb") as file:
            np.savez(file, **wide)
        content["scans_sha256"] = file_sha256(_wide_file(path))
    write_json(path, content)


def _wide_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}_scans.npz")


def read_frozen_probes(path: Path, weights: str = "", with_scans: bool = False) -> dict[str, dict[str, FrozenProbe]]:
    """The inverse of `write_frozen_probes`.

    Args:
        with_scans: also the predictors of whole scans, unless their file has not been kept.

    Raises:
        UserError: there is no such file, its probes were fitted on embeddings of networks other than `weights`, or the
            file beside it is another one.
    """
    if not path.exists():
        raise UserError(f"no frozen probes at {path}; run `python evaluate.py evaluation=probes` for this model first")
    stored = read_json(path)
    if weights and stored["weights"] != weights:
        raise UserError(f"{path}: fitted on another encoder's embeddings; run evaluation=probes again")
    wide = _read_wide(path, stored.get("scans_sha256")) if with_scans else {}
    found: dict[str, dict[str, FrozenProbe]] = {}
    for probe, predictors in stored["probes"].items():
        found[probe] = {}
        for name, value in predictors.items():
            if value["mean"] is None:
                value = value | {array: wide.get(f"{probe}/{name}/{array}") for array in ARRAYS}
            if value["mean"] is not None:
                found[probe][name] = FrozenProbe(value["columns"], LinearModel.from_dict(value))
    return found


def _read_wide(path: Path, sha256: str | None) -> dict[str, np.ndarray]:
    file = _wide_file(path)
    if sha256 is None or not file.exists():
        return {}
    if file_sha256(file) != sha256:
        raise UserError(f"{file} is not the file that belongs to {path}: run evaluation=[probes] again")
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
