"""Skipped steps: the host counts them, logs their scans and ends a run that only skips.

A step with a non-finite loss or gradient is skipped on the device (optimizer_step.py). The host reads the report of a
step only after it has started the next one, so it never waits for the step that the device is working on.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ldae.data.stream import Batch
from ldae.training.checkpoint import Progress
from ldae.training.health import SpikeDetector, suspect_samples
from ldae.training.optimizer_step import StepResult
from ldae.training.stage import Stage
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """The report of one step, while it is copied to the host.

    Attributes:
        step: number of the step.
        micro_batches: the data of the step.
        values: skipped, bad loss, number of processes asked to stop, gradient scale, loss, then for each micro-batch
            whether its loss was finite; float32 on the host, valid after `copied`.
        copied: CUDA event at the end of the copy; None on a CPU.
    """

    step: int
    micro_batches: Sequence[Batch]
    values: Tensor
    copied: torch.cuda.Event | None

    def read(self) -> list[float]:
        """The values, after waiting for this step, but not for later ones."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()


class StepGuard:
    """Runs the optimiser steps of a stage and acts on their reports.

    Args:
        progress: progress of the run; skipped steps are counted there.
        max_skipped: number of consecutive skipped steps that ends the run.
        describe_newest: describes the newest checkpoint in words, for the error message.
        stop_requested: whether this process has received a signal to stop.

    Attributes:
        stopping: some process has received a signal to stop; it becomes true at the same step on all processes.
        last_skipped: whether the last step whose report was read was skipped.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        stage: Stage,
        progress: Progress,
        max_skipped: int,
        describe_newest: Callable[[], str],
        stop_requested: Callable[[], bool],
    ) -> None:
        self.accelerator = accelerator
        self.stage = stage
        self.progress = progress
        self.max_skipped = max_skipped
        self.describe_newest = describe_newest
        self.stop_requested = stop_requested
        self.stopping = False
        self.last_skipped = False
        self._spikes = SpikeDetector()
        self._suspect_scans: set[str] = set()  # of the skipped steps in a row
        self._scale = float("inf")  # gradient scale in the last report; 1 without a scaler
        self._pending: list[StepReport] = []

    def run_step(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Run the next step and read the report of the step before. Returns the scalars of the step, on the device.

        Raises:
            UserError: `max_skipped` steps in a row were skipped.
        """
        result = self.stage.run_step(micro_batches, self.progress.step)
        self._pending.append(self._report(micro_batches, result))
        while len(self._pending) > 1:
            self._read(self._pending.pop(0))
        return result.scalars

    def read_all_reports(self) -> None:
        """Wait for the device and read all reports; call it before writing or deciding anything that depends on them.

        Raises:
            UserError: as `run_step`.
        """
        while self._pending:
            self._read(self._pending.pop(0))

    def _report(self, micro_batches: Sequence[Batch], result: StepResult) -> StepReport:
        """Start the copy of a step's report to the host."""
        stop = torch.full_like(result.skipped, float(self.stop_requested()))
        if self.accelerator.num_processes > 1:
            stop = self.accelerator.reduce(stop, "sum")
        scaler = self.accelerator.scaler
        scale = torch.ones_like(result.skipped) if scaler is None else scaler.scale(torch.ones_like(result.skipped))
        head = torch.stack([result.skipped, result.bad_loss, stop, scale, result.scalars["loss"].float()])
        values = torch.cat([head, result.finite.float()])
        copied = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return StepReport(self.progress.step, micro_batches, values, copied)

    def _read(self, report: StepReport) -> None:
        skipped, bad_loss, stop, scale, loss, *finite = report.read()
        self.stopping = self.stopping or stop > 0
        self.last_skipped = skipped > 0
        if not self.last_skipped:
            self.progress.skipped_in_a_row = 0
            self._suspect_scans.clear()
            self._warn_of_spike(report, loss)
        elif self.accelerator.scaler is not None and not bad_loss and 1 <= scale < self._scale:
            # In fp16 overflows are expected: the scaler lowers its scale until they end. At a scale of 1 they are not.
            self.progress.overflowed += 1
            self.progress.last_not_taken = report.step
        else:
            self._count_skipped(report, bool(bad_loss), [bool(value) for value in finite])
        self._scale = scale

    def _warn_of_spike(self, report: StepReport, loss: float) -> None:
        usual = self._spikes.usual_loss()
        if self._spikes.is_spike(loss):
            indices = [int(index) for batch in report.micro_batches for index in batch["index"]]
            scans = _join([self.stage.sample_name(index) for index in indices])
            log.warning("step %d: loss %.4g where %.4g is usual; its scans: %s", report.step, loss, usual, scans)

    def _count_skipped(self, report: StepReport, bad_loss: bool, finite: Sequence[bool]) -> None:
        progress = self.progress
        progress.last_not_taken = report.step
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        # If the losses of all processes are finite, only the gradient is not, and any of the scans may be the cause.
        bad = [batch for batch, fine in zip(report.micro_batches, finite, strict=True) if not (bad_loss and fine)]
        scans = gather_object([self.stage.sample_name(index) for index in suspect_samples(bad)])
        self._suspect_scans |= set(scans)
        log.warning("step %d skipped: its loss or gradient is not finite; its scans: %s", report.step, _join(scans))
        if progress.skipped_in_a_row >= self.max_skipped:
            raise UserError(
                f"{progress.skipped_in_a_row} steps in a row, up to step {report.step}, had no finite loss or "
                f"gradient; {self.describe_newest()}. Lower optim.lr, use accelerator=bf16, or look at these scans: "
                f"{_join(self._suspect_scans)}"
            )


def _join(scans: Collection[str]) -> str:
    return ", ".join(sorted(set(scans)))
