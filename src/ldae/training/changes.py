"""What has changed in a run's config since it was started, and whether the training it resumes is still the same."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ldae.config import Config
from ldae.runs import Run
from ldae.training.precision import FASTEST, choose_precision
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

# All that reaches a training. What `stage` interpolates (networks, diffusion, loss weights) is in it by value.
TRAINING = ("seed", "stage", "trainer", "optim", "data", "accelerator")
PRECISION = "accelerator.mixed_precision"
# Cadence, places, speed; and data, where the checkpoint itself knows which scans and samples it was trained on.
HARMLESS = (
    "trainer.max_steps", "trainer.max_epochs", "trainer.batch_size", "trainer.accumulate", "trainer.log_every",
    "trainer.validate_every", "trainer.validate_every_epochs", "trainer.preview_every", "trainer.checkpoint_every",
    "trainer.keep_states", "trainer.patience", "trainer.checkpointing", "trainer.compile", "trainer.channels_last",
    "trainer.workers", "trainer.max_skipped", "trainer.accept_changes", "accelerator.cpu", "accelerator.timeout",
    "accelerator._target_", "stage.estimator.start_from_unet",
    "stage.aekl", "stage.pretrain", "stage.latents", "stage.initial_weights", "data.table", "data.workers",
    "data.on_bad_scan", "data.diagnoses", "data.phantom", "data.split",
)  # fmt: skip


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def changed_keys(before: DictConfig, now: DictConfig) -> tuple[list[str], list[str]]:
    """Keys with other values: those that matter to a training that goes on, as "key: old -> new", and the harmless."""
    old, new = (dict(_leaves(OmegaConf.to_container(config, resolve=True))) for config in (before, now))
    # A setting that did not exist yet when the run was started had what is its default now.
    defaults = dict(_leaves(OmegaConf.to_container(OmegaConf.structured(Config))))
    old = {**{key: value for key, value in defaults.items() if key in new}, **old}
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    matters = [key for key in changed if key.split(".")[0] in TRAINING and not _harmless(key, now)]
    if PRECISION in matters and _precision(old) == _precision(new):
        matters.remove(PRECISION)
    lines = [f"{key}: {old.get(key)} -> {new.get(key)}" for key in matters]
    return lines, [key for key in changed if key not in matters]


def _precision(leaves: Mapping[str, Any]) -> str:
    """What the accelerator's precision comes to on this machine; `fastest` had no key of its own in older runs."""
    name = leaves.get(PRECISION, FASTEST)
    return choose_precision(name, bool(leaves.get("accelerator.cpu", False))) if name == FASTEST else name


def _harmless(key: str, now: DictConfig) -> bool:
    if key in ("trainer.max_steps", "trainer.max_epochs") and now.optim.final_factor != 1:
        return False  # the learning rate falls towards the last step
    return any(key == name or key.startswith(f"{name}.") for name in HARMLESS)


def check_changes(run: Run, now: DictConfig) -> None:
    """Compare with the config a run with states was made with.

    Raises:
        UserError: a key that matters has changed, and trainer.accept_changes is off.
    """
    if not (run.path / "config.yaml").exists() or not any((run.path / "state").glob("step_*.json")):
        return
    matters, harmless = changed_keys(run.config, now)
    if harmless:
        log.info("changed since %s was started, without effect on what it resumes: %s", run.path, ", ".join(harmless))
    if not matters:
        return
    if not now.trainer.accept_changes:
        raise UserError(
            f"{run.path} was started with other settings ({'; '.join(matters)}): restore them, use another name=..., "
            "or go on with trainer.accept_changes=true"
        )
    log.warning("%s goes on with other settings: %s", run.path, "; ".join(matters))
