"""The checks that protect against a damaged or malicious bundle. They run before anything in it is built or loaded.

A bundle may come from anyone, and loading it must neither run foreign code nor exhaust the machine:

- Code in weights: networks are stored as safetensors, and no file of a bundle is unpickled.
- Code in configs: a `_target_` may only name a class of this package's networks, transforms, views or diffusion, or a
  function that makes a schedule; never one that reads or writes files. Options that change how Hydra builds a config,
  and interpolations, which can read the environment, are refused (`refuse_untrusted_targets`).
- Memory and time: bundle.json is at most 1 MiB, numbers and lists in it are bounded, and a config may not ask for more
  blocks than its file has tensors (`refuse_oversized_network`). Networks are then built without memory, and their
  tensors compared with the file's by name and shape, before any are allocated (ldae.runs.load_module).
- Files: a bundle refers only to files in its own folder, with the content that its description states (`find_file`).
- Values of the wrong kind are refused when the description is read (ldae.bundle.description).
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ldae.bundle.description import BUILT, DESCRIPTION, OPTIONAL_FILES, VIEW
from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256

# Modules whose classes may be built.
ALLOWED_MODULES = (
    "ldae.models.", "ldae.prior.", "ldae.data.transforms.", "ldae.data.view.", "ldae.data.tissues.", "ldae.diffusion.",
)  # fmt: skip
ALLOWED_FUNCTIONS = ("ldae.diffusion.schedule.",)  # whose functions may be called as well
FORBIDDEN_KEYS = {"_args_", "_partial_", "_recursive_", "_convert_"}  # change how Hydra builds a config
MAX_NUMBER = 10_000  # far above any width, depth or number of steps
COUNTING_WORDS = ("blocks", "depth", "layers")  # in the names of arguments that count the blocks of a level
MIN_BLOCKS = 16  # blocks that any network may have


def check_bundle(folder: Path, description: Mapping[str, Any], trust: Sequence[str] = ()) -> dict[str, Path]:
    """Check everything that a description refers to; the files of the bundle by name, as in the description.

    Args:
        description: see ldae.bundle.description.
        trust: prefixes of further modules whose classes its configs may name, e.g. ("mylab.networks.",).

    Raises:
        UserError: a config or a file is refused.
    """
    where, allowed = folder / DESCRIPTION, (*ALLOWED_MODULES, *trust)
    for key in ("modules", *BUILT, VIEW):
        refuse_untrusted_targets(description.get(key), f"{where}: {key}", allowed)
    refuse_untrusted_targets(description.get("preprocess"), f"{where}: preprocess")
    entries = description["modules"] | {name: description[name] for name in OPTIONAL_FILES if description.get(name)}
    files = {name: find_file(folder, entry) for name, entry in entries.items()}
    for name, entry in description["modules"].items():
        refuse_oversized_network(entry["config"], files[name])
    return files


def refuse_untrusted_targets(value: Any, where: str, allowed: Sequence[str] = ALLOWED_MODULES) -> None:
    """Refuse a config (nested dicts and lists) with a target or option that a bundle may not have, or a large number.

    Args:
        where: for the message.
        allowed: prefixes of the modules whose classes may be built.
    """
    if isinstance(value, list):
        if len(value) > MAX_NUMBER:
            raise UserError(f"{where}: a list of {len(value)} is not allowed in a bundle")
        for item in value:
            refuse_untrusted_targets(item, where, allowed)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in FORBIDDEN_KEYS:
                raise UserError(f"{where}: '{key}' is not allowed in a bundle")
            if key == "_target_":
                _check_target(item, where, allowed)
            else:
                refuse_untrusted_targets(item, where, allowed)
    elif isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:  # also refuses NaN
        raise UserError(f"{where}: {value:.4g} is not allowed in a bundle: it could ask for any amount of memory")
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{where}: '{value}' is not allowed in a bundle")


def _check_target(name: Any, where: str, allowed: Sequence[str]) -> None:
    """Refuse anything but a public class that is defined in an allowed module, or a function that makes a schedule."""
    module, _, attribute = str(name).rpartition(".")
    if not f"{module}.".startswith(tuple(allowed)):
        raise UserError(f"{where}: '{name}' may not be built from a bundle; trust its module if you know who made it")
    try:
        target = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise UserError(f"{where}: cannot import '{name}' ({error})") from error
    is_function = f"{module}.".startswith(ALLOWED_FUNCTIONS) and inspect.isfunction(target)
    is_defined_there = getattr(target, "__module__", None) == module and not attribute.startswith("_")
    if not is_defined_there or not (inspect.isclass(target) or is_function):
        raise UserError(f"{where}: '{name}' is not an allowed target in a bundle")


def refuse_oversized_network(config: Any, file: Path) -> None:
    """Refuse a network's config that asks for more blocks than its file has tensors.

    The number of blocks is estimated as the length of the longest list (one entry for each level) times the largest
    number of blocks, layers or depth of a level.

    Raises:
        UserError: states both numbers, or the file cannot be read.
    """
    try:
        with safe_open(file, "pt") as stored:
            tensors = len(stored.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read weights {file}: {error}") from error
    lengths, counts = [1], [1]

    def collect(value: Any, is_count: bool) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                collect(item, any(word in str(key) for word in COUNTING_WORDS))
        elif isinstance(value, Sequence) and not isinstance(value, str):
            lengths.append(len(value))
            for item in value:
                collect(item, is_count)
        elif is_count and isinstance(value, int):
            counts.append(value)

    collect(config, False)
    blocks = max(lengths) * max(counts)
    if blocks > max(tensors, MIN_BLOCKS):
        raise UserError(f"{file}: its config asks for {blocks} blocks, but the file has only {tensors} tensors")


def find_file(folder: Path, entry: Mapping[str, str]) -> Path:
    """The file of a description's entry (`file`, `sha256`).

    Raises:
        UserError: it is outside the folder, missing, or does not have the stated content.
    """
    path = folder / entry["file"]
    if entry["file"] != path.name or path.resolve().parent != folder.resolve():
        raise UserError(f"bundle {folder}: '{entry['file']}' is outside the bundle's folder, which is not allowed")
    if not path.is_file():
        raise UserError(f"bundle {folder}: '{path.name}' is missing")
    if file_sha256(path) != entry["sha256"]:
        raise UserError(f"bundle {folder}: '{path.name}' is not the file that was described; get it again")
    return path
