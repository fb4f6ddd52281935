"""Training steps of a stage, one after the other as the trainer takes them, and their cost."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from ldae.bench.measure import Cost, PeakMemory, count_flops, synchronise
from ldae.bench.variant import VariantUnderTest
from ldae.data.stream import Batch, Batches, SampleStream
from ldae.training.precision import set_up_backends
from ldae.utils.errors import UserError

# Steps after the one that counts operations, in which algorithms are chosen, memory is allocated, and the step is
# recorded (training/step_graph.py).
WARM_UP = 4
SCALING = 20  # further steps, at most, in which float16's gradient scaler finds its factor


class TrainingSteps(AbstractContextManager["TrainingSteps"]):
    """The real stage of a variant on made-up data. A call takes one step with its data and does not wait for it.

    Attributes:
        size: number of samples in a step.
        number: number of the next step.
    """

    def __init__(self, variant: VariantUnderTest, name: str) -> None:
        self.variant = variant
        if not variant.settings.straight:
            set_up_backends(autotune=variant.settings.autotune)
        self.stage = variant.stage(name)
        self.size = variant.settings.batch[name]
        self.device = variant.device
        self.number = 0
        self.skipped: list[Tensor] = []
        workers = variant.config.trainer.workers or 2
        on_gpu = self.device.type == "cuda"
        stream = SampleStream(self.stage.num_samples, 0)
        self._batches = Batches(self.stage.fetch, stream, self.size, workers=workers, pin=on_gpu)

    def fetch(self) -> list[Batch]:
        """The micro-batch of the next step. The straight port starts to read it only now."""
        if not self.variant.settings.straight:
            return self._batches.at(self.number)
        position = np.arange(self.number * self.size, (self.number + 1) * self.size)
        index = position % self.stage.num_samples
        fetched = self.stage.fetch(index, position, self.number)
        return [{"index": index, "position": position, "number": self.number, **fetched}]

    def take(self, micro_batches: list[Batch]) -> None:
        """Take one step on these micro-batches."""
        result = self.stage.run_step(micro_batches, self.number)
        self.skipped.append(result.skipped)
        self.number += 1

    def __call__(self) -> None:
        self.take(self.fetch())

    def check(self) -> None:
        """Wait for the device, and verify that all steps since the last check were taken.

        In float16 some overflow while the gradient scaler looks for its factor. They cost as much as others, apart from
        the optimiser's update, and are accepted.

        Raises:
            UserError: a step was skipped because its loss or gradient was not finite.
        """
        synchronise(self.device)
        skipped = sum(float(flag) for flag in self.skipped)
        self.skipped.clear()
        if skipped and self.variant.accelerator.scaler is None:
            raise UserError(f"{self.stage.name}: {skipped:.0f} of the timed steps had no finite loss or gradient")

    def warm_up(self, count: int) -> None:
        """Take `count` steps, then more until one of them is not skipped."""
        for _ in range(count):
            self()
        for _ in range(SCALING):
            if not (self.skipped and float(self.skipped[-1])):
                break
            self()
        synchronise(self.device)
        self.skipped.clear()

    def __exit__(self, *exception: object) -> None:
        self._batches.close()


def measure_step(steps: TrainingSteps, repeats: int, count: bool = True) -> Cost:
    """Cost of a step, after one that counts its operations and a warm-up.

    Args:
        count: whether operations are counted; False for compiled code, which hides them from the counter.
    """
    flop = count_flops(steps) if count else 0.0
    on_gpu = steps.device.type == "cuda"
    steps.warm_up(WARM_UP if on_gpu else int(not count))
    seconds, waited, busy, peak = (_time_without_waits if on_gpu else _time_one_by_one)(steps, repeats)
    steps.check()
    return Cost(seconds, steps.size, flop, peak.bytes(), waited, busy)


Timing = tuple[float, float, float, PeakMemory]


def _time_without_waits(steps: TrainingSteps, repeats: int) -> Timing:
    """Time steps on a GPU that the host starts without waiting, as in training; the mean counts.

    The wait for data is the time in which the GPU idles between the end of a step and the arrival of the next batch. As
    long as the host is ahead, reading a batch costs nothing.
    """
    done, fetched = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)] for _ in range(2))
    peak, waiting = PeakMemory(steps.device), steps.variant.waiting
    waiting.seconds = 0.0
    start, core = time.perf_counter(), time.process_time()
    done[0].record()
    for number in range(repeats):
        batch = steps.fetch()
        fetched[number].record()
        steps.take(batch)
        done[number + 1].record()
    synchronise(steps.device)
    seconds, busy = time.perf_counter() - start, time.process_time() - core
    idle = sum(done[number].elapsed_time(fetched[number]) for number in range(repeats)) / 1e3
    waited = waiting.seconds if steps.variant.settings.straight else idle
    return seconds / repeats, waited / seconds, busy / repeats, peak


def _time_one_by_one(steps: TrainingSteps, repeats: int) -> Timing:
    """Time steps on a CPU; the median counts. The wait for data is the time until the batch has been fetched."""
    seconds, waits, busy, peak = [], [], [], PeakMemory(steps.device)
    waiting, straight = steps.variant.waiting, steps.variant.settings.straight
    for _ in range(repeats):
        waiting.seconds = 0.0
        start, core = time.perf_counter(), time.process_time()
        batch = steps.fetch()
        fetched = time.perf_counter() - start
        steps.take(batch)
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - core)
        waits.append(waiting.seconds if straight else fetched)
    return statistics.median(seconds), sum(waits) / sum(seconds), statistics.median(busy), peak


def measure_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call of `work`, until the device has finished."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start
