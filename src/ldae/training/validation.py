"""Validation over several processes: each takes every n-th scan, all get the same mean."""

from collections.abc import Mapping

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor


def shard_rows(rows: np.ndarray, accelerator: Accelerator) -> np.ndarray:
    """This process's share of `rows`."""
    return rows[accelerator.process_index :: accelerator.num_processes]


def mean_over_scans(found: Mapping[int, Mapping[str, Tensor]], accelerator: Accelerator) -> dict[str, float]:
    """Mean of each metric over the scans of all processes, in the order of their row numbers (sums depend on order).

    Args:
        found: one-element tensors on the device by row and by name of the metric; every row has the same names.
    """
    rows = list(read_metrics(found).items())
    everything = gather_object(rows) if accelerator.num_processes > 1 else rows
    ordered = [metrics for _, metrics in sorted(everything, key=lambda item: item[0])]
    if not ordered:
        return {}
    return {name: float(np.mean([metrics[name] for metrics in ordered])) for name in ordered[0]}


def read_metrics(found: Mapping[int, Mapping[str, Tensor]]) -> dict[int, dict[str, float]]:
    """The values of one-element tensors, read together: the one place where a validation waits for the device."""
    if not found:
        return {}
    names = list(next(iter(found.values())))
    values = torch.stack([metrics[name].float().reshape(()) for metrics in found.values() for name in names]).tolist()
    each = len(names)
    return {row: dict(zip(names, values[i * each : (i + 1) * each], strict=True)) for i, row in enumerate(found)}
