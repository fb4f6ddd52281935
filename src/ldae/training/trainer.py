"""The loop. It owns the cadence: log, validate, preview, checkpoint, stop; a stage owns the step.

Housekeeping comes before a step, so that what is saved is always between two steps. The data order, the noise and
the dropout of a step are functions of (seed, step), so that a resumed run needs no generator's state.
"""

import hashlib
import logging
import math
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ldae.config import Optim
from ldae.config import TrainerSettings as Settings
from ldae.data.stream import Batches, SampleStream
from ldae.runs import Run
from ldae.training.checkpoint import Checkpoints, Progress
from ldae.training.guard import StepGuard
from ldae.training.health import refuse_non_finite
from ldae.training.signals import StopSignals
from ldae.training.stage import Stage
from ldae.training.tracking import Tracker
from ldae.training.train_loss import NAME as TRAIN_LOSS
from ldae.training.train_loss import MeanTrainLoss
from ldae.utils.errors import UserError
from ldae.utils.files import remove_temporaries
from ldae.utils.seeding import derive_seed

log = logging.getLogger(__name__)


def learning_rate_factor(step: int, total: int, optim: Optim) -> float:
    """Linear warm-up, then half a cosine from 1 to `final_factor` at the last step."""
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(total, 1)))
    return warm * (optim.final_factor + (1 - optim.final_factor) * cosine)


class Trainer:
    """Runs a stage to its last step, or resumes it there."""

    def __init__(self, accelerator: Accelerator, run: Run, settings: Settings, optim: Optim, seed: int) -> None:
        self.accelerator = accelerator
        self.run = run
        self.settings = settings
        self.optim = optim
        self.seed = seed
        self.checkpoints = Checkpoints(run.path / "state", settings.keep_states)
        self.signals = StopSignals()

    def total_steps(self, length: int) -> int:
        """Optimiser steps of the whole run; epochs are converted with the global batch size."""
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        if self.settings.max_epochs is None:
            raise UserError("trainer.max_steps or trainer.max_epochs must be given")
        return math.ceil(self.settings.max_epochs * length / self._samples_a_step)

    def validation_interval(self, length: int) -> int | None:
        """Optimiser steps between two validations; epochs are converted with the global batch size. None: none."""
        if self.settings.validate_every_epochs is None:
            return self.settings.validate_every
        return max(1, round(self.settings.validate_every_epochs * length / self._samples_a_step))

    @property
    def _samples_a_step(self) -> int:
        return self.settings.batch_size * self.settings.accumulate * self.accelerator.num_processes

    def fit(self, stage: Stage, metadata: dict[str, Any]) -> Progress:
        """Train `stage`, publish its weights with `metadata`, and return where it ended.

        Raises:
            UserError: the run was made with other data or predecessors, or it cannot go on.
            SystemExit: with EXIT_REQUEUE, once a signal was heeded.
        """
        stage.prepare(self.accelerator, self.settings, self.optim, self.seed)
        base_lrs = {name: [g["lr"] for g in o.param_groups] for name, o in stage.optimizers.items()}
        progress = self._resume(stage, metadata)
        total = self.total_steps(stage.num_samples)
        self.validate_every = self.validation_interval(stage.num_samples)
        watches_train_loss = stage.monitor is not None and stage.monitor.metric == TRAIN_LOSS
        stops_early = watches_train_loss and self.settings.patience is not None
        self.train_loss = MeanTrainLoss(self.accelerator, progress) if stops_early else None
        main = self.accelerator.is_main_process
        tracker = Tracker(self.run.path, stage.name, progress.step, total) if main else None
        stream = SampleStream(stage.num_samples, self.seed)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        settings = self.settings
        batches = Batches(
            stage.fetch, stream, settings.batch_size, settings.accumulate, rank, world,
            workers=settings.workers or 1, pin=self.accelerator.device.type == "cuda",
        )  # fmt: skip
        if progress.step:
            log.info("resuming %s at step %d of %d", stage.name, progress.step, total)
        guard = StepGuard(
            self.accelerator, stage, progress, settings.max_skipped, self.checkpoints.describe_newest,
            told=lambda: self.signals.received is not None,
        )  # fmt: skip
        with self.signals:
            try:
                while self._housekeeping(stage, guard, total, metadata, tracker):
                    self._set_learning_rates(stage, base_lrs, progress.schedule_step, total)
                    torch.manual_seed(derive_seed(self.seed, "dropout", progress.step, rank))
                    scalars = guard(batches.at(progress.step))
                    progress.step += 1
                    if self.train_loss:
                        self.train_loss.add(scalars["loss"])
                    if progress.step % settings.log_every == 0 or progress.step == total:
                        guard.read_all_reports()
                        self._log(progress, {} if guard.last_skipped else scalars, tracker)
            finally:
                batches.close()
                if tracker:
                    tracker.close()
        log.info("%s ends at step %d; weights in %s", stage.name, progress.step, self.run.weights)
        return progress

    def _resume(self, stage: Stage, metadata: dict[str, Any]) -> Progress:
        """Where the newest whole state stands: the same one on all processes."""
        names = hashlib.sha256("\n".join(stage.sample_names).encode()).hexdigest()
        self.identity = {
            **metadata,
            **stage.metadata(),
            "training scans": [stage.num_samples, names],
            "samples a step (batch_size * accumulate * processes)": self._samples_a_step,
        }
        if self.accelerator.is_main_process:
            for folder in (self.checkpoints.folder, self.run.weights):
                remove_temporaries(folder)
        found = [self.checkpoints.newest() if self.accelerator.is_main_process else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if found[0] is None:
            return Progress()
        progress, others = self.checkpoints.restore(found[0], stage, self.accelerator.scaler, self.identity)
        if others and not self.settings.accept_changes:
            raise UserError(
                f"{self.run.path} was trained up to step {progress.step} with another {' and '.join(others)}: restore "
                "what was changed, use another name=..., or go on with trainer.accept_changes=true"
            )
        return progress

    def _log(self, progress: Progress, scalars: dict[str, Tensor], tracker: Tracker | None) -> None:
        """Means over processes to the tracker, read back together; how many steps were skipped, where any was."""
        numbers: dict[str, float] = {}
        if scalars:
            stacked = torch.stack([value.float() for value in scalars.values()])
            if self.accelerator.num_processes > 1:
                stacked = self.accelerator.reduce(stacked, "mean")
            numbers = dict(zip(scalars, stacked.tolist(), strict=True))
        if tracker:
            numbers |= {"skipped": progress.skipped} if progress.skipped else {}
            numbers |= {"overflowed": progress.overflowed} if progress.overflowed else {}
            tracker.log_scalars(progress.step, {f"train/{name}": value for name, value in numbers.items()})
            tracker.log_progress(progress.step, numbers)

    def _set_learning_rates(self, stage: Stage, base: dict[str, list[float]], step: int, total: int) -> None:
        factor = learning_rate_factor(step, total, self.optim)
        for name, optimizer in stage.optimizers.items():
            for group, lr in zip(optimizer.param_groups, base[name], strict=True):
                group["lr"] = lr * factor

    def _housekeeping(
        self, stage: Stage, guard: StepGuard, total: int, metadata: dict[str, Any], tracker: Tracker | None
    ) -> bool:
        """Validate, preview and save where due. False when there is no step to do."""
        progress, settings = guard.progress, self.settings
        step = progress.step
        last = step >= total

        def due(every: int | None) -> bool:
            return every is not None and step > 0 and (last or step % every == 0)

        if last or any(map(due, (self.validate_every, settings.preview_every, settings.checkpoint_every))):
            guard.read_all_reports()
        if due(self.validate_every) and progress.validated != step:
            self._validate(stage, progress, metadata, tracker)
        last = last or (settings.patience is not None and progress.stale > settings.patience)
        if tracker and due(settings.preview_every) and progress.previewed != step:
            with torch.no_grad(), stage.averaged():
                tracker.log_volumes(step, stage.preview())
            progress.previewed = step
        stopping = self._stopping(guard)
        if due(settings.checkpoint_every) or stopping or last:
            guard.read_all_reports()
            self._save(stage, progress, metadata, tracker)
        if stopping:
            # A launcher that sees one process leave stops the others: not before the state is written.
            self.accelerator.wait_for_everyone()
            log.warning("stopped by signal at step %d; the same command resumes", step)
            self.signals.leave()
        return not last

    def _stopping(self, guard: StepGuard) -> bool:
        """Whether to leave now. Of several processes all must leave at the same step, as the reports tell them."""
        alone = self.accelerator.num_processes == 1
        return self.signals.received is not None if alone else guard.stopping

    def _save(self, stage: Stage, progress: Progress, metadata: dict[str, Any], tracker: Tracker | None) -> None:
        if self.train_loss:
            self.train_loss.store()
        if not self.accelerator.is_main_process:
            return
        try:
            if tracker:
                tracker.flush()
            if stage.monitor is None or stage.publishes_last or progress.best is None:
                self._publish(stage, progress, metadata, {})
            self.checkpoints.save(stage, progress, self.accelerator.scaler, self.identity)
        except OSError as error:
            raise UserError(
                f"cannot save step {progress.step} ({error.strerror or error}: {error.filename or self.run.path}); "
                f"{self.checkpoints.describe_newest()}: make room or writable, and run the same command again"
            ) from error

    def _validate(self, stage: Stage, progress: Progress, metadata: dict[str, Any], tracker: Tracker | None) -> None:
        with torch.no_grad(), stage.averaged():
            metrics = stage.validate()
        if self.train_loss:
            metrics |= self.train_loss.take()
        progress.validated = progress.step
        if tracker and metrics:
            tracker.log_scalars(progress.step, {f"val/{name}": value for name, value in metrics.items()})
            log.info("  validation: %s", "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        if stage.monitor is None or stage.monitor.metric not in metrics:
            return
        value = metrics[stage.monitor.metric]
        if math.isfinite(value) and stage.monitor.improved(value, progress.best):
            progress.best, progress.best_step, progress.stale = value, progress.step, 0
            if self.accelerator.is_main_process and not stage.publishes_last:
                self._publish(stage, progress, metadata, metrics)
        else:
            progress.stale += 1

    def _publish(self, stage: Stage, progress: Progress, metadata: dict[str, Any], metrics: dict[str, float]) -> None:
        weights = stage.weights()
        for name, tensors in weights.items():
            refuse_non_finite(tensors, name, progress.step, self.checkpoints.describe_newest())
        about = {"stage": stage.name, "step": progress.step, "metrics": metrics, **metadata, **stage.metadata()}
        self.run.publish(weights, about)
