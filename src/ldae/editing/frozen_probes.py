"""Frozen probes: what `evaluation=probes` leaves in probes.json, for other cohorts and for edits. JSON only."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldae.editing.linear_model import LinearModel
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, write_json

EMBEDDING = "embedding"


@dataclass(frozen=True)
class FrozenProbe:
    """A fitted predictor and the table columns it reads (none for embeddings and latents)."""

    columns: list[str]
    model: LinearModel


def write_frozen_probes(path: Path, frozen: Mapping[str, Mapping[str, FrozenProbe]], weights: str) -> None:
    """probes.json: {"weights": hash, "probes": {probe: {predictor: arrays}}}; `embedding` is ours."""
    probes = {
        probe: {name: {"columns": entry.columns, **entry.model.to_dict()} for name, entry in entries.items()}
        for probe, entries in frozen.items()
    }
    write_json(path, {"weights": weights, "probes": probes})


def read_frozen_probes(path: Path, weights: str = "") -> dict[str, dict[str, FrozenProbe]]:
    """The inverse of `write_frozen`; refuses probes of another encoder than the one with hash `weights`."""
    if not path.exists():
        raise UserError(f"no frozen probes at {path}; run `python evaluate.py evaluation=probes` for this model first")
    stored = read_json(path)
    if weights and stored["weights"] != weights:
        raise UserError(f"{path}: fitted on another encoder's embeddings; run evaluation=probes again")
    return {
        probe: {name: FrozenProbe(value["columns"], LinearModel.from_dict(value)) for name, value in entries.items()}
        for probe, entries in stored["probes"].items()
    }
