"""Puts a network on its device, with the kernels that compute it fastest there.

The networks' own files read as in the papers and know nothing of devices. A kernel is a subclass of a module's class
with another way to compute the same function: it takes the place of the module's class and leaves its parameters, their
names and the results, up to rounding, as they were.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ldae.models.cpu_kernels import CPU_KERNELS
from ldae.models.gpu_kernels import CHANNELS_LAST_KERNELS, GPU_KERNELS, has_triton

Module = TypeVar("Module", bound=nn.Module)
Kernels = Mapping[type[nn.Module], type[nn.Module]]  # class -> the subclass that takes its place
ALL_KERNELS: tuple[Kernels, ...] = (CPU_KERNELS, GPU_KERNELS, CHANNELS_LAST_KERNELS)


def place_module(module: Module, device: torch.device, channels_last: bool = False) -> Module:
    """Move `module` to `device` and let it compute with the kernels for that device. Returns `module` itself.

    Args:
        channels_last: memory format of the convolutions' weights, and on a GPU of all volumes between them.
    """
    module.to(device)
    kernels = CPU_KERNELS if device.type == "cpu" else CHANNELS_LAST_KERNELS if channels_last else GPU_KERNELS
    use_kernels(remove_kernels(module), kernels)
    for parameter in module.parameters():
        parameter.data = to_memory_format(parameter.data, channels_last)
    return module


def computes_channels_last(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether networks that process volumes are faster channels-last on this device in this precision.

    On a GPU in 16 bits, with the kernels of gpu_kernels.py (measured: docs/bench.md).
    """
    return device.type == "cuda" and dtype != torch.float32 and has_triton()


def to_memory_format(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor, in channels-last format if `channels_last` and it has the 4 or 5 axes of a convolution."""
    if channels_last and tensor.ndim == 5:
        return tensor.to(memory_format=torch.channels_last_3d)
    if channels_last and tensor.ndim == 4:
        return tensor.to(memory_format=torch.channels_last)
    return tensor


def use_kernels(module: Module, kernels: Kernels) -> Module:
    """Give every submodule whose class is a key of `kernels` the class that belongs to it. Returns `module` itself."""
    for child in module.modules():
        child.__class__ = kernels.get(type(child), type(child))
    return module


def remove_kernels(module: Module, *kernels: Kernels) -> Module:
    """Undo `use_kernels` with these, by default with all. Returns `module` itself, which computes as it is defined."""
    for mapping in kernels or ALL_KERNELS:
        use_kernels(module, {kernel: plain for plain, kernel in mapping.items()})
    return module
