"""Puts a network on its device, with the kernels that compute it fastest there.

The networks' own files read as in the papers and know nothing of devices. A kernel is a subclass of a module's class
with another way to compute the same function: it takes the place of the module's class and leaves its parameters, their
names and the results, up to rounding, as they were.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import nn

from ldae.models.cpu_kernels import CPU_KERNELS
from ldae.models.group_norm import GPU_KERNELS

Module = TypeVar("Module", bound=nn.Module)
Kernels = Mapping[type[nn.Module], type[nn.Module]]  # class -> the subclass that takes its place


def place_module(module: Module, device: torch.device) -> Module:
    """Move `module` to `device` and let it compute with the kernels for that device. Returns `module` itself."""
    module.to(device)
    kernels, others = (CPU_KERNELS, GPU_KERNELS) if device.type == "cpu" else (GPU_KERNELS, CPU_KERNELS)
    return use_kernels(remove_kernels(module, others), kernels)


def use_kernels(module: Module, kernels: Kernels) -> Module:
    """Give every submodule whose class is a key of `kernels` the class that belongs to it. Returns `module` itself."""
    for child in module.modules():
        child.__class__ = kernels.get(type(child), type(child))
    return module


def remove_kernels(module: Module, kernels: Kernels) -> Module:
    """Undo `use_kernels`: the module computes as it is defined. Returns `module` itself."""
    return use_kernels(module, {kernel: plain for plain, kernel in kernels.items()})
