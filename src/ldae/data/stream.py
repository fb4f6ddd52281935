"""The order of training samples, shuffled in every epoch, and threads that read batches ahead of their use.

The order is a function of the position alone, so that a resumed run needs no stored state.
"""

import atexit
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import numpy as np
from torch import Tensor

from ldae.utils.errors import UserError
from ldae.utils.seeding import derive_seed

Batch = dict[str, Any]
Fetch = Callable[[np.ndarray, np.ndarray, int], Mapping[str, Any]]
Task = tuple[int, Future[list[Batch]]]

PATIENCE = 5.0  # seconds that `close` waits for reads that have begun


class SampleStream:
    """An endless sequence of samples: position p is sample permutation(epoch)[p mod length] with epoch = p // length.

    Every epoch has its own permutation, drawn from (seed, epoch). Several threads may use a stream.

    Raises:
        UserError: there are no samples.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise UserError("no scans to train on")
        self.length = length
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def indices(self, start: int, count: int) -> np.ndarray:
        """The samples at positions start to start + count - 1, (count,) int64."""
        return self.at(np.arange(start, start + count))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """The samples at any positions, int64 of the same shape."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.length)
        result = np.empty_like(places)
        for epoch in np.unique(epochs):
            result[epochs == epoch] = self._permutation(int(epoch))[places[epochs == epoch]]
        return result

    def _permutation(self, epoch: int) -> np.ndarray:
        # Another thread may clear the dictionary at any time, so that the result is kept in a local variable.
        permutation = self._permutations.get(epoch)
        if permutation is None:
            permutation = np.random.default_rng(derive_seed(self.seed, "epoch", epoch)).permutation(self.length)
            if len(self._permutations) > 2:
                self._permutations.clear()
            self._permutations[epoch] = permutation
        return permutation


class Batches:
    """The micro-batches of every optimiser step for one of `world` processes.

    Step s uses positions [s G, (s + 1) G) of the stream with G = batch_size * accumulate * world. Within them,
    micro-batch m uses the m-th block of batch_size * world positions, and process r the r-th block of batch_size within
    that. In each micro-batch, two processes of batch size b therefore use together what one of batch size 2 b uses.

    Threads read the next steps while the current one is computed, each step in one thread: as many steps ahead as there
    are threads, and at least two. The number of threads changes no batch.

    Args:
        fetch: from samples (B,) int64, their positions (B,) int64 and the number of the micro-batch, step * accumulate
            + m, to values by name; called in the threads.
        stream: the order of the samples.
        batch_size: samples per micro-batch and process.
        accumulate: micro-batches per step.
        rank: number of this process.
        world: number of processes.
        workers: number of threads; None: one.
        pin: put CPU tensors into page-locked memory, from which a copy to a CUDA device does not block. Needs CUDA.
    """

    def __init__(
        self,
        fetch: Fetch,
        stream: SampleStream,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        workers: int | None = 1,
        pin: bool = False,
    ) -> None:
        workers = 1 if workers is None else workers
        if min(batch_size, accumulate, world, workers) < 1 or not 0 <= rank < world:
            raise ValueError(
                f"batch_size {batch_size}, accumulate {accumulate}, process {rank} of {world}, {workers} workers"
            )
        self.fetch = fetch
        self.stream = stream
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.world = world
        self.workers = workers
        self.ahead = max(2, workers)
        self.pin = pin
        self._threads: list[Thread] = []
        self._queue: SimpleQueue[Task | None] = SimpleQueue()
        self._stopping = Event()
        self._loading: dict[int, Future[list[Batch]]] = {}

    def positions(self, step: int) -> np.ndarray:
        """Positions of the samples of this process in `step`, (accumulate, batch_size) int64."""
        shape = (self.accumulate, self.world, self.batch_size)
        count = self.accumulate * self.world * self.batch_size
        return np.arange(step * count, (step + 1) * count).reshape(shape)[:, self.rank]

    def at(self, step: int) -> list[Batch]:
        """The `accumulate` micro-batches of `step`.

        Each has "index" (the samples) and "position", (B,) int64, "number", which is the same on all processes, and
        what `fetch` gave. Steps may be asked for in any order; consecutive ones are read ahead.

        Raises:
            Whatever `fetch` raised, with a note that names the samples.
        """
        if not self._threads:
            self._start()
        wanted = range(step, step + 1 + self.ahead)
        for other in self._loading.keys() - set(wanted):  # after a jump, steps that are still in the queue are not read
            self._loading.pop(other).cancel()
        for number in wanted:
            if number not in self._loading:
                self._loading[number] = Future()
                self._queue.put((number, self._loading[number]))
        return self._loading.pop(step).result()

    def close(self) -> None:
        """Stop the threads, waiting at most PATIENCE seconds for reads that have begun. `at` starts new threads."""
        self._stopping.set()
        for future in self._loading.values():
            future.cancel()
        for _ in self._threads:
            self._queue.put(None)
        deadline = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._threads, self._loading = [], {}
        atexit.unregister(self.close)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> None:
        # A thread that did not end in `close` keeps its own queue and event. Daemon threads do not keep the process
        # alive, but should be stopped before the interpreter shuts down.
        self._queue, self._stopping = SimpleQueue(), Event()
        for number in range(self.workers):
            arguments = (self._queue, self._stopping)
            self._threads.append(Thread(target=self._read, args=arguments, name=f"batches-{number}", daemon=True))
            self._threads[-1].start()
        atexit.register(self.close)

    def _read(self, queue: "SimpleQueue[Task | None]", stopping: Event) -> None:
        """Body of a thread: read one step after the other until the queue gives None."""
        while (task := queue.get()) is not None:
            self._complete(*task, stopping)
            del task  # so that the thread holds no reference to the batches

    def _complete(self, step: int, future: Future[list[Batch]], stopping: Event) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self._load(step, stopping))
        except BaseException as error:  # noqa: BLE001 - raised again by `at`
            future.set_exception(error)

    def _load(self, step: int, stopping: Event) -> list[Batch]:
        batches = []
        for number, positions in enumerate(self.positions(step), step * self.accumulate):
            if stopping.is_set():
                raise CancelledError
            index = self.stream.at(positions)
            try:
                fetched = self.fetch(index, positions, number)
                batch = {"index": index, "position": positions, "number": number, **fetched}
                batches.append(_pinned(batch) if self.pin else batch)
            except Exception as error:
                error.add_note(f"while fetching samples {index.tolist()} of step {step}")
                raise
        return batches


def _pinned(batch: Batch) -> Batch:
    return {
        name: value.pin_memory() if isinstance(value, Tensor) and value.device.type == "cpu" else value
        for name, value in batch.items()
    }
