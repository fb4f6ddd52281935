"""The mean training loss since the last validation, on which a stage without a validation criterion stops early.

The losses are summed on the device: no training step waits for the host to read one back.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

from ldae.training.checkpoint import Progress

NAME = "train_loss"  # among a stage's validation metrics


class MeanTrainLoss:
    """Sum and number of the finite losses of this process; the totals over all processes are stored in `progress`."""

    def __init__(self, accelerator: Accelerator, progress: Progress) -> None:
        self.accelerator = accelerator
        self.progress = progress
        start = [progress.loss_sum, progress.loss_count] if accelerator.is_main_process else [0.0, 0.0]
        self.totals = torch.tensor(start, dtype=torch.float64, device=accelerator.device)

    def add(self, loss: Tensor) -> None:
        """Count the loss (0-d, on the device) of one optimiser step."""
        loss = loss.double()
        finite = torch.isfinite(loss)
        self.totals += torch.stack([torch.where(finite, loss, torch.zeros_like(loss)), finite.double()])

    def store(self) -> None:
        """Write the totals into `progress`, for a checkpoint; all processes call this."""
        totals = self.totals
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals.clone(), "sum")
        self.progress.loss_sum, self.progress.loss_count = totals.tolist()

    def take(self) -> dict[str, float]:
        """The mean by its metric's name, empty if no step was counted; the next mean starts from nothing."""
        self.store()
        mean = {NAME: self.progress.loss_sum / self.progress.loss_count} if self.progress.loss_count else {}
        self.totals.zero_()
        self.progress.loss_sum = self.progress.loss_count = 0.0
        return mean
