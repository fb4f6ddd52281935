"""What an encoder takes from the training scans before it is trained: their mean, or their principal components."""

import logging
import math

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldae.data.components import ComponentsFit
from ldae.data.mean_volume import measure_mean_volume
from ldae.data.volumes import Volumes
from ldae.models.components_encoder import ComponentsEncoder
from ldae.training.device import load_volumes

log = logging.getLogger(__name__)

MEAN_VOLUME_SCANS = 512  # training scans in an encoder's mean volume, at most
BATCH_BYTES = 2**28  # of the views that are read at a time, as float32


def fit_encoder(
    encoder: nn.Module, views: Volumes, rows: np.ndarray, accelerator: Accelerator, seed: int, components: bool = True
) -> None:
    """Measure on training scans what the encoder, or a residual in it, needs to know of them. All processes call this.

    Args:
        encoder: on the device of `accelerator`.
        views: what the encoder sees of each scan.
        rows: of the training scans.
        components: whether principal components are fitted; otherwise the encoder keeps those that it has.
    """
    for module in encoder.modules():
        if getattr(module, "mean_volume", None) is not None:
            module.set_mean_volume(*measure_mean_volume(views, rows[:MEAN_VOLUME_SCANS]))
        if components and isinstance(module, ComponentsEncoder):
            _fit_components(module, views, rows, accelerator, seed)


def _fit_components(
    encoder: ComponentsEncoder, views: Volumes, rows: np.ndarray, accelerator: Accelerator, seed: int
) -> None:
    if encoder.count >= len(rows):
        log.warning(
            "model.encoder.components=%d, but %d training scans have only %d: the others are 0",
            encoder.count, len(rows), len(rows) - 1,
        )  # fmt: skip
    batch = min(max(BATCH_BYTES // (4 * math.prod(encoder.shape)), 4), 64)

    def read(chosen: np.ndarray) -> Tensor:
        return encoder.pool(load_volumes(views, chosen, accelerator.device))

    def add_up(tensor: Tensor) -> Tensor:
        return accelerator.reduce(tensor, "sum") if accelerator.num_processes > 1 else tensor

    process, processes = accelerator.process_index, accelerator.num_processes
    fit = ComponentsFit(read, rows, encoder.count, seed, batch, process, processes, add_up)
    with torch.autocast(accelerator.device.type, enabled=False):
        encoder.set_components(*fit.run())
