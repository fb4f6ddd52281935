"""Records the forward and backward passes of a training step as a CUDA graph (models/cuda_graph.py)."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from ldae.config import TrainerSettings
from ldae.data.stream import Batch
from ldae.models.cuda_graph import RecordedWork
from ldae.training.device import batch_to_device

WARM_UP = 3  # calls before the recording, in which algorithms are chosen and memory is allocated

Losses = tuple[dict[str, Tensor], Tensor]  # by name, and of each micro-batch
Passes = Callable[[Sequence[Batch]], Losses]


def can_record(trainer: TrainerSettings, accelerator: Accelerator) -> bool:
    """Whether the passes of a step are to be recorded: on one GPU, unless checkpointing is on, which cannot be."""
    alone = accelerator.num_processes == 1 and accelerator.device.type == "cuda"
    return trainer.cuda_graph and alone and not trainer.checkpointing


class StepGraph:
    """Forward and backward passes of a step, recorded after some calls and replayed from then on.

    The recorded kernels work on memory of their own: losses are overwritten by the next call, as are the gradients of
    the parameters, which must therefore not be set to None between the calls. Random numbers on the GPU follow the seed
    that is set before a call, as without a graph. If the passes cannot be recorded, they run without a graph.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.calls = 0
        self.work: RecordedWork[Losses] = RecordedWork(device, "the training step")
        self._inputs: list[Batch] = []

    def __call__(self, passes: Passes, micro_batches: Sequence[Batch], clear: Callable[[], None]) -> Losses:
        """Run the passes on these micro-batches.

        Args:
            passes: must not read values back; its shapes and Python branches must be the same in all calls.
            clear: sets the gradients to None.
        """
        work = self.work
        if self.calls == WARM_UP:
            self._inputs = self._to_device(micro_batches)
            clear()
            work.record(lambda: passes(self._inputs))
        self.calls += 1
        if not work.recorded:
            clear()
            return work.run(lambda: passes(self._to_device(micro_batches)))
        for static, batch in zip(self._inputs, micro_batches, strict=True):
            for name, value in batch.items():
                if isinstance(value, Tensor):
                    static[name].copy_(value, non_blocking=True)
        return work.replay()

    def _to_device(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        return [batch_to_device(batch, self.device) for batch in micro_batches]
