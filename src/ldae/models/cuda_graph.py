"""CUDA graphs: the kernels of some work on a GPU, recorded once and then started by the host as a whole.

An evaluation of the networks consists of some hundred small kernels, and a training step of some thousand. Starting
them one by one takes the host longer than the GPU needs to compute them (docs/bench.md).
"""

import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class RecordedWork(Generic[Result]):
    """Work on a GPU that runs as it is, until `record` has recorded it.

    The recorded kernels read and write memory of their own: the result is overwritten by the next `replay`.

    Attributes:
        recorded: whether `replay` is possible.
        failed: whether recording has been tried in vain; it is then not tried again.
        graph, result: the recorded kernels, and the tensors that they write.
    """

    def __init__(self, device: torch.device, what: str) -> None:
        self.recorded = self.failed = False
        self._what = what
        self.graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream(device)
        self.result: Result | None = None

    def run(self, work: Callable[[], Result]) -> Result:
        """Run the work on the stream of the recording, so that libraries set up their workspaces for it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            result = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Result]) -> None:
        """Record the work without computing it. It must not read values back. Failure is logged."""
        try:
            with torch.cuda.graph(self.graph, stream=self._stream, capture_error_mode="thread_local"):
                self.result = work()
            self.recorded = True
        except RuntimeError as error:
            self.failed = True
            log.warning(
                "%s cannot be recorded as a CUDA graph and runs without one: %s", self._what, str(error).splitlines()[0]
            )

    def replay(self) -> Result:
        """Compute the recorded work from what its inputs contain now."""
        self.graph.replay()
        return self.result


Function = Callable[..., tuple[Tensor, ...]]  # of tensors on the device
MOST_GRAPHS = 6  # each keeps the memory of its activations


class GraphCache:
    """Runs functions of tensors on a GPU without gradients, from recorded graphs once their shapes have been seen.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cached: dict[tuple[object, ...], tuple[RecordedWork[tuple[Tensor, ...]], list[Tensor]]] = {}

    def __call__(self, function: Function, *inputs: Tensor) -> tuple[Tensor, ...]:
        """function(*inputs). It must depend on its inputs and on module weights alone, and be the same object again."""
        # A counter of operations (a dispatch mode) would not see those of a replay.
        counted = torch._C._len_torch_dispatch_stack() > 0
        if counted or torch.is_grad_enabled() or torch.cuda.is_current_stream_capturing():
            return function(*inputs)
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        key = (function, precision, *((value.shape, value.dtype) for value in inputs))
        if key not in self.cached:
            if len(self.cached) >= MOST_GRAPHS:
                self.cached.pop(next(iter(self.cached)))
            work: RecordedWork[tuple[Tensor, ...]] = RecordedWork(self.device, "an evaluation of the networks")
            self.cached[key] = work, []
            return work.run(lambda: function(*inputs))
        work, static = self.cached[key]
        if not (work.recorded or work.failed):
            static += [value.clone() for value in inputs]
            work.record(lambda: self._without_weight_cache(function, static))
        if work.failed:
            return function(*inputs)
        for target, value in zip(static, inputs, strict=True):
            target.copy_(value)
        return tuple(value.clone() for value in work.replay())

    def _without_weight_cache(self, function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Autocast keeps casted weights until its context ends, but the graph would read them after that."""
        enabled = torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), enabled, cache_enabled=False):
            return function(*inputs)
