"""Validation on several processes: each evaluates its share of the scans, and all get the same mean."""

from collections.abc import Mapping

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

MetricsByRow = Mapping[int, Mapping[str, Tensor]]  # one-element tensors on the device; all rows have the same names


def shard_rows(rows: np.ndarray, accelerator: Accelerator) -> np.ndarray:
    """The rows that this process evaluates: every n-th of them for n processes."""
    return rows[accelerator.process_index :: accelerator.num_processes]


def mean_over_scans(metrics_by_row: MetricsByRow, accelerator: Accelerator) -> dict[str, float]:
    """Mean of each metric over the scans of all processes.

    The scans are summed in the order of their rows, so that rounding does not depend on the number of processes.
    """
    rows = list(read_metrics(metrics_by_row).items())
    everything = gather_object(rows) if accelerator.num_processes > 1 else rows
    ordered = [metrics for _, metrics in sorted(everything, key=lambda item: item[0])]
    if not ordered:
        return {}
    return {name: float(np.mean([metrics[name] for metrics in ordered])) for name in ordered[0]}


def read_metrics(metrics_by_row: MetricsByRow) -> dict[int, dict[str, float]]:
    """The values of the metrics, copied to the host together; only here does a validation wait for the device."""
    if not metrics_by_row:
        return {}
    names = list(next(iter(metrics_by_row.values())))
    scalars = [metrics[name].float().reshape(()) for metrics in metrics_by_row.values() for name in names]
    values = iter(torch.stack(scalars).tolist())
    return {row: {name: next(values) for name in names} for row in metrics_by_row}
