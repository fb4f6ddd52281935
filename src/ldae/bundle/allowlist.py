"""What the configs of a bundle, which may come from strangers, are allowed to build."""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from ldae.utils.errors import UserError

# What a bundle's configs may build. Never functions that read or write files.
ALLOWED = ("ldae.models.", "ldae.data.transforms.", "ldae.diffusion.")
FUNCTIONS = ("ldae.diffusion.schedule.",)
MAX_NUMBER = 10_000  # widths, depths, steps: far above what any network has
NOT_ALLOWED = {"_args_", "_partial_", "_recursive_", "_convert_"}


def refuse_untrusted_targets(value: Any, where: str, allowed: Sequence[str] = ALLOWED) -> None:
    """Refuse a config that would build anything but this package's networks, transforms and diffusion, of any size."""
    if isinstance(value, list):
        if len(value) > MAX_NUMBER:
            raise UserError(f"{where}: a list of {len(value)} is not allowed in a bundle")
        for item in value:
            refuse_untrusted_targets(item, where, allowed)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in NOT_ALLOWED:
                raise UserError(f"{where}: '{key}' is not allowed in a bundle")
            if key == "_target_":
                _check_target(item, where, allowed)
            else:
                refuse_untrusted_targets(item, where, allowed)
    elif isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:  # NaN too
        raise UserError(f"{where}: {value:.4g} is not allowed in a bundle: it could ask for any amount of memory")
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{where}: '{value}' is not allowed in a bundle")


def _check_target(name: Any, where: str, allowed: Sequence[str]) -> None:
    """A class defined in an allowed module, or one of the schedules' functions."""
    module, _, attribute = str(name).rpartition(".")
    if not f"{module}.".startswith(tuple(allowed)):
        raise UserError(f"{where}: '{name}' may not be built from a bundle; trust its module if you know who made it")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise UserError(f"{where}: cannot import '{name}' ({error})") from error
    kind = inspect.isfunction if f"{module}.".startswith(FUNCTIONS) else inspect.isclass
    own = getattr(found, "__module__", None) == module and not attribute.startswith("_")
    if not own or not (inspect.isclass(found) or kind(found)):
        raise UserError(f"{where}: '{name}' is nothing that a bundle may build")
