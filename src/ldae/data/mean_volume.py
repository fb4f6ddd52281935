"""The mean of a set of volumes and the size of the differences from it."""

import numpy as np
import torch
from torch import Tensor

from ldae.data.volumes import Volumes

BATCH = 8  # volumes that are read at a time


def measure_mean_volume(volumes: Volumes, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Mean of the volumes of `rows`, (1, C, X, Y, Z), and root mean square of the differences from it, 0-d; float32."""
    total = squares = torch.zeros(())
    for start in range(0, len(rows), BATCH):
        x = volumes.batch(rows[start : start + BATCH]).double()
        total, squares = total + x.sum(0, keepdim=True), squares + x.square().sum(0, keepdim=True)
    mean = total / len(rows)
    return mean.float(), (squares / len(rows) - mean**2).mean().clamp(min=1e-12).sqrt().float()
