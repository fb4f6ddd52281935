"""Moving data and networks to the device: copies that do not block the host, and the memory format of convolutions."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldae.config import TrainerSettings
from ldae.data.stream import Batch
from ldae.data.volumes import Volumes
from ldae.models.placement import place_module


def batch_to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; copies from pinned memory do not block the host."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def load_volumes(volumes: Volumes, rows: np.ndarray, device: torch.device) -> Tensor:
    """Volumes of these rows, (B, 1, X, Y, Z) float32 in [0, 1], on `device`."""
    return volumes.decode(volumes.read_stored(rows).to(device, non_blocking=True))


def uses_channels_last(trainer: TrainerSettings, accelerator: Accelerator, latents: bool = True) -> bool:
    """Memory format for this device and config: whether networks and their inputs are stored channels-last.

    By default channels-last on a CPU and contiguous on a GPU, as measured (docs/bench.md): on a GPU a step of stage 2
    takes a fifth longer channels-last, because PyTorch's group norm there converts between the formats. For latents on
    a CPU never channels-last: the backward pass of PyTorch's GroupNorm crashes in that format if its input needs no
    gradient (seen with PyTorch 2.13 in bf16).

    Args:
        latents: whether the networks process latents rather than volumes.
    """
    on_cpu = accelerator.device.type == "cpu"
    wanted = on_cpu if trainer.channels_last is None else trainer.channels_last
    return wanted and not (latents and on_cpu)


def to_memory_format(tensor: Tensor, channels_last: bool) -> Tensor:
    """The tensor, in channels-last format if `channels_last` and it has the 4 or 5 axes of a convolution."""
    if channels_last and tensor.ndim == 5:
        return tensor.to(memory_format=torch.channels_last_3d)
    if channels_last and tensor.ndim == 4:
        return tensor.to(memory_format=torch.channels_last)
    return tensor


def module_to_device(module: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """The module on `device` (see place_module), with its convolutions' weights in the format of `to_memory_format`."""
    place_module(module, device)
    for parameter in module.parameters():
        parameter.data = to_memory_format(parameter.data, channels_last)
    return module
