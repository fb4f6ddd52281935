"""Refuse to resume a run whose config has changed in a way that would make it another training."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from ldae.config import HARMLESS, HARMLESS_AT_CONSTANT_RATE, RESUME, Config
from ldae.data.view import is_default_view
from ldae.runs import Run
from ldae.training.precision import FASTEST, HARMLESS_ON_RESUME, choose_precision
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

PRECISION = "accelerator.mixed_precision"


def check_changes(run: Run, now: DictConfig) -> None:
    """Compare the config `now` with the one that `run` was started with; nothing if it has no checkpoint yet.

    Raises:
        UserError: a key that matters has another value, and trainer.accept_changes is off.
    """
    if not (run.path / "config.yaml").exists() or not any((run.path / "state").glob("step_*.json")):
        return
    changes, harmless = changed_keys(run.config, now)
    if harmless:
        log.info("changed since %s was started, without effect on what is resumed: %s", run.path, ", ".join(harmless))
    if not changes:
        return
    if not now.trainer.accept_changes:
        raise UserError(
            f"{run.path} was started with other settings ({'; '.join(changes)}): restore them, use another name=..., "
            "or continue with trainer.accept_changes=true"
        )
    log.warning("%s continues with other settings: %s", run.path, "; ".join(changes))


def changed_keys(before: DictConfig, now: DictConfig) -> tuple[list[str], list[str]]:
    """The keys whose values differ: those that matter to a resumed training as "key: old -> new", and the harmless."""
    old, new = (_flatten(OmegaConf.to_container(config, resolve=True)) for config in (before, now))
    # A setting that did not exist yet when the run was started had what is its default now.
    defaults = _flatten(OmegaConf.to_container(OmegaConf.structured(Config)))
    old = {**{key: value for key, value in defaults.items() if key in new}, **old}
    if "data.view._target_" not in old and is_default_view(now.get("data", {}).get("view") or {}):
        view = {key: value for key, value in new.items() if key.startswith("data.view.")}
        old = {key: value for key, value in old.items() if key != "data.view"} | view
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    harmless = [key for key in changed if _is_harmless(key, now) or (key == PRECISION and _same_precision(old, new))]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in changed if key not in harmless], harmless


def _is_harmless(key: str, now: DictConfig) -> bool:
    """Whether the definition of `key` says that a run may be resumed with another value."""
    if key.startswith("data.view"):
        return not get_class(now.stage._target_).reads_views
    group, _, rest = key.partition(".")
    if group == "accelerator":
        return _is_among(rest, HARMLESS_ON_RESUME)
    if group == "stage":
        return _is_among(rest, get_class(now.stage._target_).harmless_on_resume)
    metadata = _resume_metadata(key)
    return metadata == HARMLESS or (metadata == HARMLESS_AT_CONSTANT_RATE and now.optim.final_factor == 1)


def _is_among(key: str, names: Sequence[str]) -> bool:
    """Whether `key` is one of `names` or below one of them."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _resume_metadata(key: str) -> Mapping[str, str]:
    """What the schema says about resuming with another value of `key`; empty where it says nothing."""
    if key.split(".")[0] not in {item.name for item in fields(Config)}:
        return HARMLESS  # a group of an earlier version, which no training reads any more
    schema: Any = Config
    for name in key.split("."):
        found = {item.name: item for item in fields(schema)}.get(name) if is_dataclass(schema) else None
        if found is None:
            break
        if RESUME in found.metadata:
            return found.metadata
        schema = found.type
    return {}


def _same_precision(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether both come to the same precision on this machine. Runs without the key were made with `fastest`."""

    def chosen(leaves: Mapping[str, Any]) -> str:
        name = leaves.get(PRECISION, FASTEST)
        return choose_precision(name, bool(leaves.get("accelerator.cpu", False))) if name == FASTEST else name

    return chosen(old) == chosen(new)


def _flatten(config: Any) -> dict[str, Any]:
    """A nested config as values by dotted key."""

    def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for name, item in value.items():
                yield from leaves(item, f"{key}.{name}" if key else str(name))
        else:
            yield key, value

    return dict(leaves(config, ""))
