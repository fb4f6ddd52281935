"""Clocks, peak memory, FLOPs and the machine's matrix rate."""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Cost:
    """What one call of a task costs.

    Attributes:
        seconds: median of the repeats.
        scans: that one call treats.
        flop: floating-point operations of its matrix products and convolutions (a multiply-add is two).
        peak: bytes of memory at its worst: of the GPU, or by which the process grew.
        waited: share of the time that it waited for data.
        busy: seconds of this process's cores, which other processes on the machine do not lengthen by much.
    """

    seconds: float
    scans: int
    flop: float = 0.0
    peak: float = 0.0
    waited: float = 0.0
    busy: float = 0.0

    def scaled(self, factor: float) -> "Cost":
        """The same work `factor` times."""
        return Cost(self.seconds * factor, self.scans, self.flop * factor, self.peak, self.waited, self.busy * factor)

    def numbers(self, matrix_rate: float) -> dict[str, float]:
        """Flat names to numbers; `matrix_rate` in FLOP/s."""
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
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Peak memory since it was made: the GPU's allocations, or the growth of this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = 0
            return
        # Linux forgets the peak when asked to; elsewhere only a new record counts.
        self.resets = CLEAR.exists()
        if self.resets:
            CLEAR.write_text("5")
        self.start = _resident("VmRSS") if self.resets else _record()

    def bytes(self) -> int:
        """So far."""
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


def run_flop_counter(work: Callable[[], Any]) -> FlopCounterMode:
    """The FLOPs of one call of `work`, by kind.

    Attention is counted as the two products that it is: the counter does not know a CPU's fused kernel.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return counter


def count_flops(work: Callable[[], Any]) -> float:
    """FLOPs of one call of `work`, which is also its warm-up."""
    return float(run_flop_counter(work).get_total_flops())


def time_calls(work: Callable[[], Any], repeats: int, device: torch.device, scans: int = 1) -> Cost:
    """The cost of one call of `work`; one run counts FLOPs, one warms up where kernels are chosen by measuring."""
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
    """FLOP/s of a matrix product of this edge: the best of `repeats`, what this machine can do."""
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
