"""Checkpoints for resuming: a safetensors file with numbers in its header, and a JSON file with its hash beside it.

The JSON file is written last, so a checkpoint without it is incomplete. The newest intact checkpoint is resumed.
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
    """Progress of a run between two optimiser steps; stored in checkpoints under these names.

    Attributes:
        step: number of the next optimiser step.
        best, best_step: best value of the monitored metric and the step at which it was reached.
        stale: number of validations since the best one.
        validated, previewed: step of the last validation and of the last preview.
        skipped: number of steps with a non-finite loss or gradient.
        skipped_in_a_row: number of these up to the latest step.
        overflowed: number of fp16 steps that were not taken while the gradient scaler searched its scale.
        loss_sum, loss_count: of the training losses since the last validation (train_loss.py).
        last_not_taken: latest step that was skipped or overflowed.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    validated: int = -1
    previewed: int = -1
    skipped: int = 0
    skipped_in_a_row: int = 0
    overflowed: int = 0
    loss_sum: float = 0.0
    loss_count: float = 0.0
    last_not_taken: int = -1

    @property
    def updates(self) -> int:
        """Number of steps that changed the weights, as far as the host knows."""
        return self.step - self.skipped - self.overflowed

    @property
    def schedule_step(self) -> int:
        """Step count of the learning-rate schedule: all steps, except those not taken up to the last but one.

        The host usually learns whether a step was taken while the next one runs. When it knows earlier, as after a
        checkpoint, that knowledge is not used, so that neither resuming nor the frequency of logging changes a rate.
        """
        return self.updates + (self.last_not_taken == self.step - 1)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of an optimiser as tensors by name, and everything else as plain values."""
    state = optimizer.state_dict()
    tensors, scalars = {}, {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            target = tensors if isinstance(value, Tensor) else scalars
            target[f"{index}.{key}"] = value
    return tensors, {"scalars": scalars, "groups": state["param_groups"]}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Load into an optimiser what `flatten_optimizer` returned."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **rest["scalars"]}.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": rest["groups"]})
    # Files contain contiguous tensors, but a fused step needs a moment in the memory format of its parameter.
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they are stored.
        keep: number of the newest checkpoints that are kept, at least 1.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = max(keep, 1)

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.json"))

    def save(
        self, stage: Stage, progress: Progress, scaler: torch.amp.GradScaler | None, identity: dict[str, Any]
    ) -> None:
        """Write a checkpoint of step `progress.step`, then remove the oldest ones beyond `keep`.

        Args:
            identity: data and predecessors of the training, compared when it is resumed.

        Raises:
            UserError: a tensor contains NaN or infinity.
            OSError: the checkpoint cannot be written; the earlier ones remain.
        """
        tensors: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for kind, parts in (("modules", stage.modules), ("averages", stage.averages)):
            for name, part in parts.items():
                tensors |= {f"{kind}/{name}/{key}": value for key, value in part.state_dict().items()}
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
        """The newest checkpoint in words, for error messages."""
        paths = self._paths()
        return f"the state of step {int(paths[-1].stem[5:])} is kept" if paths else "no state was saved before"

    def newest(self) -> Path | None:
        """The newest intact checkpoint; None if none was ever written.

        Raises:
            UserError: there are checkpoints, but all are damaged.
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
            raise UserError(
                f"no checkpoint in {self.folder} is intact: restore one, or remove the folder to start again"
            )
        return None

    def restore(
        self, path: Path, stage: Stage, scaler: torch.amp.GradScaler | None, identity: dict[str, Any]
    ) -> tuple[Progress, list[str]]:
        """Load a checkpoint into `stage`.

        Returns:
            Its progress, and the keys of `identity` whose values have changed since.

        Raises:
            UserError: the checkpoint belongs to another model.
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
                f"{path} is a checkpoint of another model ({reason}): use another name=..., or remove the run"
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
