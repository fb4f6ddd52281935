"""What the host learns of the steps: it reads their reports one step late, so that it never waits for the newest one.

A step whose loss or gradient is not finite is not taken (stage.py decides on the device). Here it is counted, its scans
are named, and a run that only skips is ended.
"""

import logging
from collections.abc import Callable, Sequence
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
    """One step on its way to the host.

    Attributes:
        step: its number.
        micro_batches: what it was computed from.
        values: skipped, a loss was not finite, told to stop, gradient scale, loss, then whether each micro-batch's loss
            was finite; float32 on the host. Valid once `copied` has happened.
        copied: event behind the copy; None where there was nothing to copy.
    """

    step: int
    micro_batches: Sequence[Batch]
    values: Tensor
    copied: torch.cuda.Event | None

    def read(self) -> list[float]:
        """The values, after waiting for this step, not for later ones."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()


class StepGuard:
    """Runs the steps of `stage`.

    Args:
        accelerator: of the stage.
        progress: where the run stands; skipped steps are counted there.
        limit: skipped steps in a row that end the run.
        kept: says which state is on disk.
        told: whether this process was told to stop.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        stage: Stage,
        progress: Progress,
        limit: int,
        kept: Callable[[], str],
        told: Callable[[], bool],
    ) -> None:
        self.accelerator = accelerator
        self.stage = stage
        self.progress = progress
        self.limit = limit
        self.kept = kept
        self.told = told
        self.watch = SpikeDetector()
        self.suspects: set[str] = set()
        self.stopping = False  # some process was told to stop; all processes read this at the same step
        self.last_skipped = False  # of the last step whose report was read
        self._scale = float("inf")  # of the gradients in the last report, as a scaler has it; 1 without one
        self._pending: list[StepReport] = []

    def __call__(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Take the next step; returns its scalars, on the device. Reads the report of the step before.

        Raises:
            UserError: too many steps were skipped in a row.
        """
        result = self.stage.run_step(micro_batches, self.progress.step)
        self._pending.append(self._report(micro_batches, result))
        while len(self._pending) > 1:
            self._read(self._pending.pop(0))
        return result.scalars

    def read_all_reports(self) -> None:
        """Read all reports: the host waits for the device. Before anything that is written or decided by them."""
        while self._pending:
            self._read(self._pending.pop(0))

    def _report(self, micro_batches: Sequence[Batch], result: StepResult) -> StepReport:
        told = torch.full_like(result.skipped, float(self.told()))
        if self.accelerator.num_processes > 1:
            told = self.accelerator.reduce(told, "sum")
        scaler = self.accelerator.scaler
        scale = torch.ones_like(result.skipped) if scaler is None else scaler.scale(torch.ones_like(result.skipped))
        head = torch.stack([result.skipped, result.bad_loss, told, scale, result.scalars["loss"].float()])
        values = torch.cat([head, result.finite.float()])
        copied = None
        if values.device.type == "cuda":
            host = torch.empty(values.shape, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        return StepReport(self.progress.step, micro_batches, values, copied)

    def _read(self, report: StepReport) -> None:
        skipped, bad_loss, told, scale, loss, *finite = report.read()
        self.stopping = self.stopping or told > 0
        self.last_skipped = skipped > 0
        if not self.last_skipped:
            self.progress.skipped_in_a_row = 0
            self.suspects.clear()
            self._watch(report, loss)
        elif self.accelerator.scaler is not None and not bad_loss and 1 <= scale < self._scale:
            # fp16 overflows by design: the scaler lowers its scale, until nothing is left to lower.
            self.progress.overflowed += 1
            self.progress.last_not_taken = report.step
        else:
            self._skip(report, bool(bad_loss), [bool(fine) for fine in finite])
        self._scale = scale

    def _watch(self, report: StepReport, loss: float) -> None:
        usual = self.watch.usual_loss()
        if self.watch.is_spike(loss):
            scans = [self.stage.sample_name(int(index)) for batch in report.micro_batches for index in batch["index"]]
            log.warning("step %d: loss %.4g where %.4g is usual; its scans: %s", report.step, loss, usual, _list(scans))

    def _skip(self, report: StepReport, bad_loss: bool, finite: Sequence[bool]) -> None:
        progress = self.progress
        progress.last_not_taken = report.step
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        # Where all losses of all processes are finite, the gradient is at fault, and any scan may be.
        bad = [batch for batch, fine in zip(report.micro_batches, finite, strict=True) if not (bad_loss and fine)]
        scans = gather_object([self.stage.sample_name(index) for index in suspect_samples(bad)])
        self.suspects |= set(scans)
        log.warning("step %d skipped: its loss or gradient is not finite; its scans: %s", report.step, _list(scans))
        if progress.skipped_in_a_row >= self.limit:
            raise UserError(
                f"{progress.skipped_in_a_row} steps in a row, up to step {report.step}, had no finite loss or "
                f"gradient; {self.kept()}. Lower optim.lr, use accelerator=bf16, or look at these scans: "
                f"{_list(self.suspects)}"
            )


def _list(scans: Sequence[str] | set[str]) -> str:
    return ", ".join(sorted(set(scans)))
