"""Validation over several processes: each takes every n-th scan, all get the same mean."""

from collections.abc import Mapping

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object


def spread(rows: np.ndarray, accelerator: Accelerator) -> np.ndarray:
    """This process's share of `rows`."""
    return rows[accelerator.process_index :: accelerator.num_processes]


def mean_over_scans(found: Mapping[int, Mapping[str, float]], accelerator: Accelerator) -> dict[str, float]:
    """Mean of each metric over the scans of all processes, in the order of their row numbers (sums depend on order)."""
    everything = gather_object(list(found.items())) if accelerator.num_processes > 1 else list(found.items())
    ordered = [metrics for _, metrics in sorted(everything, key=lambda item: item[0])]
    if not ordered:
        return {}
    return {name: float(np.mean([metrics[name] for metrics in ordered])) for name in ordered[0]}
