"""Measures of one call: time, peak memory, operations; and the rate of matrix products that the machine reaches."""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux only


@dataclass(frozen=True)
class Cost:
    """Cost of one call of a task.

    Attributes:
        seconds: median of the repeats.
        scans: number of scans that one call processes.
        flop: floating-point operations of its matrix products and convolutions; a multiply-add counts as two.
        peak: peak memory in bytes, of the GPU, or the largest growth of the process.
        waited: share of the time spent waiting for data.
        busy: seconds of this process's cores, which other processes on the machine hardly lengthen.
    """

    seconds: float
    scans: int
    flop: float = 0.0
    peak: float = 0.0
    waited: float = 0.0
    busy: float = 0.0

    def scaled(self, factor: float) -> "Cost":
        """Cost of doing the same `factor` times."""
        return Cost(self.seconds * factor, self.scans, self.flop * factor, self.peak, self.waited, self.busy * factor)

    def numbers(self, matrix_rate: float) -> dict[str, float]:
        """The numbers of bench.json by name; `matrix_rate` in FLOP/s."""
        return {
            "ms": 1e3 * self.seconds,
            "core_ms": 1e3 * self.busy,
            "scans_per_second": self.scans / self.seconds,
            "peak_mb": self.peak / 2**20,
            "gflop": self.flop / 1e9,
            "matrix_share": self.flop / self.seconds / matrix_rate,
            "wait_share": self.waited,
        }


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Peak memory since construction: allocations on a GPU, otherwise the growth of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = 0
            return
        # Linux can reset the recorded peak. Elsewhere growth is noticed only beyond the largest size so far.
        self.resets = CLEAR.exists()
        if self.resets:
            CLEAR.write_text("5")
        self.start = _resident("VmRSS") if self.resets else _record()

    def bytes(self) -> int:
        """Peak so far, in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return (_resident("VmHWM") if self.resets else _record()) - self.start


def _resident(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return 0


def _record() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run_flop_counter(work: Callable[[], object]) -> FlopCounterMode:
    """Count the floating-point operations of one call of `work`; the counter has them by kind.

    Attention is computed as its two products here, because the counter does not know a CPU's fused kernel.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter


def count_flops(work: Callable[[], object]) -> float:
    """Floating-point operations of one call of `work`, which also serves as its warm-up."""
    return float(run_flop_counter(work).get_total_flops())


def time_calls(work: Callable[[], object], repeats: int, device: torch.device, scans: int = 1) -> Cost:
    """Cost of one call of `work`, the median of `repeats` calls.

    A first call counts operations; on a GPU, another one lets cuDNN choose its algorithms by trying them.

    Args:
        scans: number of scans that one call processes.
    """
    flop = count_flops(work)
    if device.type == "cuda":
        work()
    seconds, busy, peak = [], [], PeakMemory(device)
    for _ in range(repeats):
        synchronise(device)
        start, core = time.perf_counter(), time.process_time()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - core)
    return Cost(statistics.median(seconds), scans, flop, peak.bytes(), busy=statistics.median(busy))


def measure_matrix_rate(edge: int, device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Rate of an (edge, edge) matrix product in FLOP/s, the best of `repeats`: what this machine can reach."""
    a = torch.randn(edge, edge, device=device, dtype=dtype)
    b = torch.randn(edge, edge, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b)
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return 2 * edge**3 / best
