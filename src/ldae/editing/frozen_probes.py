"""probes.json: the fitted linear probes of an evaluation (evaluation=probes), for other cohorts and for edits."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ldae.editing.linear_model import LinearModel
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, write_json

EMBEDDING = "embedding"  # name of the predictor that reads y; the others are baselines


@dataclass(frozen=True)
class FrozenProbe:
    """A fitted predictor and the table columns that it reads (none for embeddings and latents)."""

    columns: list[str]
    model: LinearModel


def write_frozen_probes(path: Path, probes: Mapping[str, Mapping[str, FrozenProbe]], weights: str) -> None:
    """Write {"weights": hash, "probes": {probe: {predictor: its arrays}}} as JSON.

    Args:
        probes: probe name -> predictor name -> predictor.
        weights: hash of the networks whose embeddings the probes were fitted on.
    """
    stored = {
        probe: {name: {"columns": entry.columns, **entry.model.to_dict()} for name, entry in predictors.items()}
        for probe, predictors in probes.items()
    }
    write_json(path, {"weights": weights, "probes": stored})


def read_frozen_probes(path: Path, weights: str = "") -> dict[str, dict[str, FrozenProbe]]:
    """The inverse of `write_frozen_probes`.

    Raises:
        UserError: there is no such file, or its probes were fitted on embeddings of networks other than `weights`.
    """
    if not path.exists():
        raise UserError(f"no frozen probes at {path}; run `python evaluate.py evaluation=probes` for this model first")
    stored = read_json(path)
    if weights and stored["weights"] != weights:
        raise UserError(f"{path}: fitted on another encoder's embeddings; run evaluation=probes again")
    return {
        probe: {name: FrozenProbe(value["columns"], LinearModel.from_dict(value)) for name, value in predictors.items()}
        for probe, predictors in stored["probes"].items()
    }
