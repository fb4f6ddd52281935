"""The order of training samples as a pure function of position: endless, shuffled, nothing to save for a resume."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from ldae.errors import UserError
from ldae.noise import derive

Batch = dict[str, Any]


class SampleStream:
    """Position p of the stream is sample permutation(epoch)[p mod length], epoch = p // length.

    Every epoch has its own permutation, drawn from (seed, epoch).

    Raises:
        UserError: no samples.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise UserError("no scans to train on")
        self.length = length
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def indices(self, start: int, count: int) -> np.ndarray:
        """Samples at positions start ... start + count - 1, (count,) int64."""
        return self.at(np.arange(start, start + count))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Samples at any positions, int64 of the same shape."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.length)
        result = np.empty_like(places)
        for epoch in np.unique(epochs):
            result[epochs == epoch] = self._permutation(int(epoch))[places[epochs == epoch]]
        return result

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            if len(self._permutations) > 2:
                self._permutations.clear()
            rng = np.random.default_rng(derive(self.seed, "epoch", epoch))
            self._permutations[epoch] = rng.permutation(self.length)
        return self._permutations[epoch]


class Batches:
    """The micro-batches of every optimiser step for one of `world` processes.

    Step s takes positions [s G, (s + 1) G), G = batch_size * accumulate * world; within it, micro-batch m takes the
    m-th run of batch_size * world positions, and process r the r-th run of batch_size within that. Two processes of
    batch b thus see, in each micro-batch, what one process of batch 2 b sees.

    The next step is fetched by one background thread while the current one is computed.

    Args:
        fetch: samples (B,) int64 to named tensors; called in the thread.
    """

    def __init__(
        self,
        fetch: Callable[[np.ndarray], Mapping[str, Any]],
        stream: SampleStream,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if min(batch_size, accumulate, world) < 1 or not 0 <= rank < world:
            raise ValueError(f"batch_size {batch_size}, accumulate {accumulate}, process {rank} of {world}")
        self.fetch = fetch
        self.stream = stream
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.world = world
        self._thread: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def positions(self, step: int) -> np.ndarray:
        """Global positions of this process's samples in `step`, (accumulate, batch_size) int64."""
        shape = (self.accumulate, self.world, self.batch_size)
        count = self.accumulate * self.world * self.batch_size
        return np.arange(step * count, (step + 1) * count).reshape(shape)[:, self.rank]

    def at(self, step: int) -> list[Batch]:
        """The `accumulate` micro-batches of `step`.

        Each holds "index" and "position" (B,) int64, its global "number", the same on all processes, and what `fetch`
        gives.

        Raises:
            Whatever `fetch` raised, with the samples noted.
        """
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="batches")
        ahead, self._next = self._next, None
        if ahead is None or ahead[0] != step:
            ahead = step, self._thread.submit(self._load, step)
        batches = ahead[1].result()
        self._next = step + 1, self._thread.submit(self._load, step + 1)
        return batches

    def close(self) -> None:
        """Stop the thread; `at` may start it again."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = self._next = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _load(self, step: int) -> list[Batch]:
        batches = []
        for number, positions in enumerate(self.positions(step), step * self.accumulate):
            index = self.stream.at(positions)
            try:
                fetched = self.fetch(index)
            except Exception as error:
                error.add_note(f"while fetching samples {index.tolist()} of step {step}")
                raise
            batches.append({"index": index, "position": positions, "number": number, **fetched})
        return batches
