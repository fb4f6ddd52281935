"""The mean training loss since the last validation, for stages that stop early by it.

The losses are summed on the device, so that no training step waits until the host has read one.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

from ldae.training.checkpoint import Progress

TRAIN_LOSS = "train_loss"  # its name among the validation metrics


class MeanTrainLoss:
    """Mean of the finite training losses of all processes.

    Args:
        progress: where the sum and number of losses are stored with a checkpoint, and read when a run is resumed.
    """

    def __init__(self, accelerator: Accelerator, progress: Progress) -> None:
        self.accelerator = accelerator
        self.progress = progress
        start = [progress.loss_sum, progress.loss_count] if accelerator.is_main_process else [0.0, 0.0]
        self.totals = torch.tensor(start, dtype=torch.float64, device=accelerator.device)

    def add(self, loss: Tensor) -> None:
        """Add the loss of one optimiser step, 0-d, on the device; a non-finite loss is ignored."""
        loss = loss.double()
        finite = torch.isfinite(loss)
        self.totals += torch.stack([torch.where(finite, loss, torch.zeros_like(loss)), finite.double()])

    def store(self) -> None:
        """Write sum and number of losses into `progress`, for a checkpoint. To be called by all processes."""
        totals = self.totals
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals.clone(), "sum")
        self.progress.loss_sum, self.progress.loss_count = totals.tolist()

    def take(self) -> dict[str, float]:
        """The mean by the name of its metric, empty if there was no loss; then start a new mean."""
        self.store()
        mean = {TRAIN_LOSS: self.progress.loss_sum / self.progress.loss_count} if self.progress.loss_count else {}
        self.totals.zero_()
        self.progress.loss_sum = self.progress.loss_count = 0.0
        return mean
