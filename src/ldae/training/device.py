"""Moving data to the device without blocking the host, and the memory format of convolutions."""

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from ldae.config import TrainerSettings
from ldae.data.stream import Batch
from ldae.data.volumes import Volumes
from ldae.models.placement import computes_channels_last
from ldae.training.precision import DTYPES


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

    By default channels-last on a CPU, and on a GPU in 16 bits (`computes_channels_last`). For latents on a CPU never
    channels-last: the backward pass of PyTorch's GroupNorm crashes in that format if its input needs no gradient (seen
    with PyTorch 2.13 in bf16).

    Args:
        latents: whether the networks process latents rather than volumes.
    """
    on_cpu = accelerator.device.type == "cpu"
    default = on_cpu or computes_channels_last(accelerator.device, DTYPES[accelerator.mixed_precision])
    wanted = default if trainer.channels_last is None else trainer.channels_last
    return wanted and not (latents and on_cpu)
