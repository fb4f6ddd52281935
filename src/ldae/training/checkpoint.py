"""Training state on disk: one safetensors file a checkpoint, its scalars and hash in a JSON beside it.

The JSON is written after the tensors, so a state counts only when it is whole; the newest whole one is resumed.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldae.errors import UserError
from ldae.files import file_sha256, read_json, write_json
from ldae.models.state import read_tensors
from ldae.runs import save_tensors
from ldae.training.stage import Stage

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands, between two optimiser steps."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0  # validations since the best
    validated: int = -1  # the last step that was validated


def _flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors by name, and the rest as plain numbers."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            target = tensors if isinstance(value, Tensor) else scalars
            target[f"{index}.{key}"] = value
    return tensors, {"scalars": scalars, "groups": state["param_groups"]}


def _unflatten(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **rest["scalars"]}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})


class Checkpoints:
    """The states of one run, newest last."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.json"))

    def save(self, stage: Stage, progress: Progress, scaler: Any) -> None:
        """Write the state at `progress.step`, then remove the oldest beyond `keep`."""
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for kind, holders in (("modules", stage.modules), ("averages", stage.averages)):
            for name, holder in holders.items():
                tensors |= {f"{kind}/{name}/{key}": value for key, value in holder.state_dict().items()}
        for name, optimizer in stage.optimizers.items():
            flat, rest[name] = _flatten(optimizer)
            tensors |= {f"optimizers/{name}/{key}": value for key, value in flat.items()}
        path = self.folder / f"step_{progress.step:08d}.safetensors"
        save_tensors(path, tensors)
        write_json(
            path.with_suffix(".json"),
            {
                "progress": asdict(progress),
                "optimizers": rest,
                "scaler": scaler.state_dict() if scaler is not None else None,
                "sha256": file_sha256(path),
            },
        )
        for old in self._paths()[: -self.keep]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def restore(self, stage: Stage, scaler: Any) -> Progress:
        """Load the newest whole state into `stage`; a fresh Progress where there is none."""
        for path in reversed(self._paths()):
            weights = path.with_suffix(".safetensors")
            try:
                record = read_json(path)
                if file_sha256(weights) != record["sha256"]:
                    raise UserError(f"{weights} does not have the hash it was written with")
                tensors = read_tensors(weights)
            except (UserError, OSError, ValueError, KeyError) as error:
                log.warning("skipping a damaged checkpoint: %s", error)
                continue
            self._apply(stage, tensors, record, weights)
            if scaler is not None and record["scaler"] is not None:
                scaler.load_state_dict(record["scaler"])
            return Progress(**record["progress"])
        return Progress()

    @staticmethod
    def _apply(stage: Stage, tensors: dict[str, Tensor], record: dict[str, Any], source: Path) -> None:
        def part(kind: str, name: str) -> dict[str, Tensor]:
            prefix = f"{kind}/{name}/"
            return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

        try:
            for name, module in stage.modules.items():
                module.load_state_dict(part("modules", name))
            for name, ema in stage.averages.items():
                ema.load_state_dict(part("averages", name))
            for name, optimizer in stage.optimizers.items():
                _unflatten(optimizer, part("optimizers", name), record["optimizers"][name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{source} is the state of another model ({reason}): use another name=..., or remove the run"
            ) from error
