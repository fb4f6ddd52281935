"""Around each step: a bad one leaves no trace in the weights, is counted, and names its scans."""

import logging
from collections.abc import Callable, Sequence

from accelerate.utils import gather_object
from torch import Tensor

from ldae.errors import UserError
from ldae.training.checkpoint import Progress
from ldae.training.health import Batch, LossWatch, NonFiniteStep, kept_buffers, suspects
from ldae.training.stage import Stage

log = logging.getLogger(__name__)


class StepGuard:
    """Runs the steps of `stage`.

    Args:
        progress: where the run stands; skipped steps are counted there.
        limit: skipped steps in a row that end the run.
        kept: says which state is on disk.
    """

    def __init__(self, stage: Stage, progress: Progress, limit: int, kept: Callable[[], str]) -> None:
        self.stage = stage
        self.progress = progress
        self.limit = limit
        self.kept = kept
        self.watch = LossWatch()
        self.suspects: set[str] = set()

    def __call__(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor | float]:
        """The stage's scalars; none of a step that was skipped.

        Raises:
            UserError: too many were skipped in a row.
        """
        buffers = kept_buffers(self.stage.modules)
        try:
            scalars = self.stage.run_step(micro_batches, self.progress.step)
        except NonFiniteStep as error:
            for buffer, before in buffers:
                buffer.copy_(before)
            self._skip(error)
            return {}
        self.progress.skipped_in_a_row = 0
        self.suspects.clear()
        usual, loss = self.watch.usual(), float(scalars.get("loss", 0.0))
        if self.watch.spike(loss):
            scans = [self.stage.name_of(int(index)) for batch in micro_batches for index in batch["index"]]
            log.warning(
                "step %d: loss %.4g where %.4g is usual; its scans: %s", self.progress.step, loss, usual, _list(scans)
            )
        return scalars

    def _skip(self, error: NonFiniteStep) -> None:
        progress = self.progress
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        scans = gather_object([self.stage.name_of(index) for index in suspects(error.micro_batches)])
        self.suspects |= set(scans)
        log.warning("step %d skipped: its loss or gradient is not finite; its scans: %s", progress.step, _list(scans))
        if progress.skipped_in_a_row >= self.limit:
            raise UserError(
                f"{progress.skipped_in_a_row} steps in a row, up to step {progress.step}, had no finite loss or "
                f"gradient; {self.kept()}. Lower optim.lr, use accelerator=bf16, or look at these scans: "
                f"{_list(self.suspects)}"
            )


def _list(scans: Sequence[str] | set[str]) -> str:
    return ", ".join(sorted(set(scans)))
