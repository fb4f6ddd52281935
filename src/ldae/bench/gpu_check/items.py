"""One measurement: done, failed, or skipped because it would not fit into the rest of the budget."""

import contextlib
import gc
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

from ldae.bench.gpu_check.check import BudgetSpent, GpuCheck, Numbers

LIMIT = 1500  # length of a reported traceback, in characters


@dataclass(frozen=True)
class Item:
    """A measurement, and about how many seconds it takes on a GPU of 2022 or later."""

    name: str
    seconds: float
    work: Callable[[GpuCheck], Numbers]


@dataclass
class Outcome:
    """The outcome of a measurement. `state` is "done", "failed" or "skipped"."""

    state: str
    seconds: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def run_item(item: Item, check: GpuCheck) -> Outcome:
    """Measure. A failure becomes an outcome; only a signal to stop is not caught."""
    cost = item.seconds * check.size.seconds
    if cost > check.left:
        left = max(check.left, 0)
        return Outcome("skipped", reason=f"takes about {cost:.0f} s, and {left:.0f} s were left of the budget")
    start = time.monotonic()
    try:
        with _until(check.left):
            numbers = dict(item.work(check))
        return Outcome("done", time.monotonic() - start, numbers)
    except BudgetSpent:
        return Outcome("skipped", time.monotonic() - start, reason="the budget ended while it ran")
    except Exception as error:  # noqa: BLE001 - the other measurements should continue
        return Outcome("failed", time.monotonic() - start, reason=_tail(error))
    finally:
        _clean_up()


def _tail(error: BaseException) -> str:
    """The end of the first cause's traceback: Hydra wraps what a constructor raises."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = "".join(traceback.format_exception(error, chain=False)).rstrip().splitlines()
    return "\n".join(line for line in lines if line.strip(" ^~"))[-LIMIT:]


@contextlib.contextmanager
def _until(seconds: float) -> Iterator[None]:
    """Raise BudgetSpent after this many seconds, as soon as Python code runs."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise BudgetSpent

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _clean_up() -> None:
    """Release memory, compiled code and Accelerate's state, so that the next measurement starts like the first."""
    gc.collect()
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    if "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        with contextlib.suppress(RuntimeError):  # a lost device is reported elsewhere
            sys.modules["torch"].cuda.empty_cache()
