"""Reads tensors from files without running code from them, and loads them into networks strictly."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldae.utils.errors import UserError


def read_tensors(path: Path | str, bare: bool = False) -> dict[str, Tensor]:
    """The tensors by name of a .safetensors file or of a PyTorch checkpoint, of which only tensors are unpickled.

    Args:
        bare: whether a PyTorch file may consist of a single tensor, which gets the name "".

    Raises:
        UserError: the file is missing or damaged, or contains something else than named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights {path}: there is no such file; give the path of a file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read weights {path}: {reason}") from error
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if bare and isinstance(found, Tensor):
        return {"": found}
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"weights {path}: expected named tensors, found {type(found).__name__}")
    return dict(found)


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as handle:
        return handle.read(2) == b"PK"


def load_strictly(module: nn.Module, tensors: dict[str, Tensor], source: Path | str, assign: bool = False) -> None:
    """Load tensors into a module, if they are exactly those of its state dict.

    Args:
        source: where the tensors come from, for error messages.
        assign: use the tensors themselves instead of copying them, for modules built on the meta device.

    Raises:
        UserError: names the first tensor that is missing, unexpected or of another shape.
    """
    check_tensors({name: tensor.shape for name, tensor in module.state_dict().items()}, tensors, source)
    module.load_state_dict(tensors, assign=assign)


def load_weights(module: nn.Module, path: Path | str) -> None:
    """Load the weights of a file into a module, strictly.

    Raises:
        UserError: the file cannot be read, or does not fit the module (see read_tensors and load_strictly).
    """
    load_strictly(module, read_tensors(path), path)


def check_tensors(expected: dict[str, torch.Size], tensors: dict[str, Tensor], source: Path | str) -> None:
    """Refuse tensors unless they have exactly the names and shapes of `expected`.

    Raises:
        UserError: names the first tensor that is missing, unexpected or of another shape.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{source}: tensor '{name}' is missing")
        if tensors[name].shape != shape:
            raise UserError(f"{source}: tensor '{name}' is {tuple(tensors[name].shape)}, not {tuple(shape)}")
    for name in tensors:
        if name not in expected:
            raise UserError(f"{source}: unexpected tensor '{name}'")
