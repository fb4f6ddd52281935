"""forecast.safetensors: the forecaster that evaluation=[forecast] stores with a model, for `ldae forecast`.

Arrays are tensors; everything else is JSON in the header, with the hash of the networks whose y it was fitted on.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ldae.editing.covariates import Covariate
from ldae.editing.editor import Editor
from ldae.editing.forecaster import Forecaster, Spread, VolumeForecast
from ldae.models.state import read_tensors
from ldae.runs import save_tensors
from ldae.utils.errors import UserError

KEY = "forecast"  # of the header
ARRAYS = ("centre", "basis", "rate", "residuals")
VOLUME = "volume/"  # begins the names of the rates of volumes
AGAIN = "run `python evaluate.py evaluation=[forecast]` for this model again"


def write_forecaster(path: Path, forecaster: Forecaster, weights: str) -> None:
    """Write a forecaster.

    Args:
        weights: hash of the networks whose y it was fitted on.
    """
    arrays = {name: getattr(forecaster, name) for name in ARRAYS}
    arrays |= {f"{VOLUME}{name}": one.rate for name, one in forecaster.volumes.items()}
    described = {
        "weights": weights,
        "unit": forecaster.unit,
        "covariates": [one.to_dict() for one in forecaster.covariates],
        "spread": vars(forecaster.spread),
        "years": list(forecaster.years),
        "volumes": {name: {"spread": vars(one.spread), "width": one.width} for name, one in forecaster.volumes.items()},
        "editor": vars(forecaster.editor),
        "pairs": forecaster.pairs,
        "subjects": forecaster.subjects,
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array, np.float64)) for name, array in arrays.items()}
    save_tensors(path, tensors, {KEY: json.dumps(described)})


def read_forecaster(path: Path, weights: str) -> Forecaster:
    """The inverse of `write_forecaster`.

    Raises:
        UserError: the file is missing or damaged, or belongs to networks other than `weights`.
    """
    arrays = {name: tensor.double().numpy() for name, tensor in read_tensors(path).items()}
    try:
        with safe_open(path, "pt") as file:
            described = json.loads(file.metadata()[KEY])
        stored = described["weights"]
        found = _build(arrays, described)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is damaged ({error}): {AGAIN}") from error
    if stored != weights:
        raise UserError(f"{path} belongs to another encoder: {AGAIN}")
    return found


def _build(arrays: dict[str, np.ndarray], described: dict) -> Forecaster:
    """The forecaster; ValueError, KeyError or TypeError if something does not fit."""
    low, high = (float(value) for value in described["years"])
    volumes = {
        str(name): VolumeForecast(arrays[f"{VOLUME}{name}"], _spread(entry["spread"]), float(entry["width"]))
        for name, entry in described["volumes"].items()
    }
    covariates = tuple(Covariate.from_dict(value) for value in described["covariates"])
    (dim, count), width = arrays["basis"].shape, sum(one.width for one in covariates)
    rows = 1 + count + width
    expected = {"centre": (dim,), "rate": (rows, count), **{f"{VOLUME}{name}": (rows,) for name in volumes}}
    wrong = [name for name, shape in expected.items() if arrays[name].shape != shape]
    if wrong or arrays["residuals"].ndim != 2 or arrays["residuals"].shape[1] != count or not len(arrays["residuals"]):
        raise ValueError(f"the shape of {(wrong or ['residuals'])[0]} does not fit")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError("a number is not finite")
    return Forecaster(
        **{name: arrays[name] for name in ARRAYS},
        unit=float(described["unit"]),
        covariates=covariates,
        spread=_spread(described["spread"]),
        years=(low, high),
        volumes=volumes,
        editor=Editor(**described["editor"]),
        pairs=int(described["pairs"]),
        subjects=int(described["subjects"]),
    )


def _spread(value: dict) -> Spread:
    return Spread(float(value["constant"]), float(value["growing"]))
