"""Training state on disk: one safetensors file a checkpoint, scalars in its header, its hash in a JSON beside it.

The JSON is written after the tensors, so that a state counts only when it is whole; the newest whole one is resumed.
"""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ldae.models.state import read_tensors
from ldae.runs import save_tensors
from ldae.training.health import refuse_non_finite
from ldae.training.stage import Stage
from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256, read_json, write_json

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where a run stands, between two optimiser steps."""

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0  # validations since the best
    validated: int = -1  # the last step that was validated
    previewed: int = -1
    skipped: int = 0  # steps without a finite loss and gradient
    skipped_in_a_row: int = 0
    overflowed: int = 0  # steps that fp16's gradient scaler refused while it looked for its scale
    loss_sum: float = 0.0  # of training losses since the last validation (train_loss.py)
    loss_count: float = 0.0

    last_not_taken: int = -1  # the newest step that was skipped or overflowed

    @property
    def updates(self) -> int:
        """Optimiser steps that are known to have been taken."""
        return self.step - self.skipped - self.overflowed

    @property
    def schedule_step(self) -> int:
        """What the learning rate counts: all steps but those not taken up to the last but one.

        The host hears of a step while the next one runs. Where it knows the last one already, as after a checkpoint,
        that is left out, so that neither a resume nor the cadence of log lines changes a rate.
        """
        return self.updates + (self.last_not_taken == self.step - 1)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors by name, and the rest as plain numbers."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            target = tensors if isinstance(value, Tensor) else scalars
            target[f"{index}.{key}"] = value
    return tensors, {"scalars": scalars, "groups": state["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **rest["scalars"]}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
    # Files hold tensors contiguously; a fused step walks the memory of a parameter and of its moments alike.
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class Checkpoints:
    """The states of one run, newest last."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = max(keep, 1)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.json"))

    def save(self, stage: Stage, progress: Progress, scaler: Any, identity: dict[str, Any]) -> None:
        """Write the state at `progress.step`, then remove the oldest beyond `keep`.

        Args:
            identity: what the state belongs to (data, weights it stands on), to be compared on resume.

        Raises:
            UserError: the state holds NaN or infinity.
            OSError: it cannot be written; the states before it stay.
        """
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for kind, holders in (("modules", stage.modules), ("averages", stage.averages)):
            for name, holder in holders.items():
                tensors |= {f"{kind}/{name}/{key}": value for key, value in holder.state_dict().items()}
        for name, optimizer in stage.optimizers.items():
            flat, rest[name] = flatten_optimizer(optimizer)
            tensors |= {f"optimizers/{name}/{key}": value for key, value in flat.items()}
        refuse_non_finite(tensors, "state", progress.step, self.describe_newest())
        state = {
            "progress": asdict(progress),
            "optimizers": rest,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "identity": identity,
        }
        path = self.folder / f"step_{progress.step:08d}.safetensors"
        save_tensors(path, tensors, {"state": json.dumps(state)})
        write_json(path.with_suffix(".json"), {"sha256": file_sha256(path)})
        for old in self._paths()[: -self.keep]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)

    def describe_newest(self) -> str:
        """Which state is kept, in words."""
        paths = self._paths()
        return f"the state of step {int(paths[-1].stem[5:])} is kept" if paths else "no state was saved before"

    def newest(self) -> Path | None:
        """The newest whole state; None where there never was one.

        Raises:
            UserError: there are states, but none is whole.
        """
        for path in reversed(self._paths()):
            weights = path.with_suffix(".safetensors")
            try:
                if file_sha256(weights) != read_json(path)["sha256"]:
                    raise ValueError(f"{weights} does not have the hash it was written with")
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("skipping a damaged checkpoint: %s", error)
                continue
            return weights
        if self._paths():
            raise UserError(f"no checkpoint in {self.folder} is whole: restore one, or remove the folder to start anew")
        return None

    def restore(self, path: Path, stage: Stage, scaler: Any, identity: dict[str, Any]) -> tuple[Progress, list[str]]:
        """Load a state into `stage`.

        Returns:
            Where it stood, and which parts of its identity are others now.

        Raises:
            UserError: it is the state of another model.
        """
        tensors = read_tensors(path)
        with safe_open(path, "pt") as file:
            state = json.loads((file.metadata() or {}).get("state", "{}"))
        try:
            self._apply(stage, tensors, state["optimizers"])
            if scaler is not None and state["scaler"]:
                scaler.load_state_dict(state["scaler"])
            progress = Progress(**state["progress"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path} is the state of another model ({reason}): use another name=..., or remove the run"
            ) from error
        now = json.loads(json.dumps(identity))
        then = state["identity"]
        return progress, [key for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key)]

    @staticmethod
    def _apply(stage: Stage, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
        def part(kind: str, name: str) -> dict[str, Tensor]:
            prefix = f"{kind}/{name}/"
            return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

        for name, module in stage.modules.items():
            module.load_state_dict(part("modules", name))
        for name, ema in stage.averages.items():
            ema.load_state_dict(part("averages", name))
        for name, optimizer in stage.optimizers.items():
            restore_optimizer(optimizer, part("optimizers", name), rest[name])
