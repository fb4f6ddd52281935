"""The training loop: it decides when to log, validate, preview, save and stop; the stage performs the optimiser step.

All of this happens before an optimiser step, so that a checkpoint is always taken between two steps. The order of the
data, the noise and the dropout of a step are functions of (seed, step): to resume, no state of a random number
generator is needed.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from ldae.config import Optim, TrainerSettings
from ldae.data.stream import Batches, SampleStream
from ldae.runs import Run
from ldae.training.checkpoint import Checkpoints, Progress
from ldae.training.guard import StepGuard
from ldae.training.health import refuse_non_finite
from ldae.training.learning_rate import LearningRates
from ldae.training.run_clock import RunClock
from ldae.training.signals import StopSignals
from ldae.training.stage import Stage
from ldae.training.tracking import Tracker
from ldae.training.train_loss import TRAIN_LOSS, MeanTrainLoss
from ldae.utils.errors import UserError
from ldae.utils.files import remove_temporaries
from ldae.utils.seeding import derive_seed

log = logging.getLogger(__name__)


class Trainer:
    """Trains a stage up to its last step, resuming from the newest checkpoint of the run if there is one.

    Args:
        run: folder of the stage, for checkpoints, logs and published weights.
        seed: of the order of the samples, their random draws, and dropout.
    """

    stage: Stage
    metadata: Mapping[str, Any]
    progress: Progress
    tracker: Tracker | None  # main process only
    guard: StepGuard
    clock: RunClock
    train_loss: MeanTrainLoss | None  # only if early stopping depends on it

    def __init__(self, accelerator: Accelerator, run: Run, settings: TrainerSettings, optim: Optim, seed: int) -> None:
        self.accelerator = accelerator
        self.run = run
        self.settings = settings
        self.optim = optim
        self.seed = seed
        self.checkpoints = Checkpoints(run.path / "state", settings.keep_states)
        self.signals = StopSignals()

    def total_steps(self, num_samples: int) -> int:
        """Optimiser steps of the whole training; epochs are converted with the global batch size.

        Raises:
            UserError: neither max_steps nor max_epochs is set.
        """
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        if self.settings.max_epochs is None:
            raise UserError("trainer.max_steps or trainer.max_epochs must be given")
        return math.ceil(self.settings.max_epochs * num_samples / self._samples_per_step)

    def validation_interval(self, num_samples: int) -> int | None:
        """Optimiser steps between two validations, epochs converted with the global batch size; None: no validation."""
        if self.settings.validate_every_epochs is None:
            return self.settings.validate_every
        return max(1, round(self.settings.validate_every_epochs * num_samples / self._samples_per_step))

    @property
    def _samples_per_step(self) -> int:
        return self.settings.batch_size * self.settings.accumulate * self.accelerator.num_processes

    def fit(
        self, stage: Stage, metadata: Mapping[str, Any], on_accepted: Callable[[], None] = lambda: None
    ) -> Progress:
        """Train `stage` and publish its weights together with `metadata`. Returns the progress at the end.

        Args:
            on_accepted: called once it is certain that nothing is refused, before anything else is written.

        Raises:
            UserError: the run was started with other data or predecessors, or training cannot continue.
            SystemExit: with EXIT_REQUEUE, after a signal to stop.
        """
        self.stage, self.metadata = stage, metadata
        stage.prepare(self.accelerator, self.settings, self.optim, self.seed)
        # What a stage without optimisers publishes is measured in `prepare`.
        self.total = self.total_steps(stage.num_samples) if stage.optimizers else 0
        self.learning_rates = LearningRates(stage.optimizers, self.total, self.optim)
        self.progress = self._resume()
        on_accepted()
        self.validate_every = self.validation_interval(stage.num_samples)
        monitors_train_loss = stage.monitor is not None and stage.monitor.metric == TRAIN_LOSS
        stops_early = monitors_train_loss and self.settings.patience is not None
        self.train_loss = MeanTrainLoss(self.accelerator, self.progress) if stops_early else None
        main = self.accelerator.is_main_process
        self.tracker = Tracker(self.run.path, stage.name, self.progress.step, self.total) if main else None
        if self.progress.step:
            log.info("resuming %s at step %d of %d", stage.name, self.progress.step, self.total)
        self.guard = StepGuard(
            self.accelerator, stage, self.progress, self.settings.max_skipped, self.checkpoints.describe_newest,
            stop_requested=lambda: self.signals.received is not None,
        )  # fmt: skip
        self.clock = RunClock(self.run, self.progress.step)
        batches = self._batches()
        with self.signals:
            try:
                self._loop(batches)
            finally:
                batches.close()
                if self.tracker:
                    self.tracker.close()
        if main:
            self.clock.store(self.progress.step, finished=True)
        log.info("%s ended at step %d; weights in %s", stage.name, self.progress.step, self.run.weights)
        return self.progress

    def _batches(self) -> Batches:
        """The micro-batches of this process."""
        settings, accelerator = self.settings, self.accelerator
        return Batches(
            self.stage.fetch, SampleStream(self.stage.num_samples, self.seed), settings.batch_size, settings.accumulate,
            accelerator.process_index, accelerator.num_processes,
            workers=settings.workers or 1, pin=accelerator.device.type == "cuda",
        )  # fmt: skip

    def _loop(self, batches: Batches) -> None:
        progress, rank = self.progress, self.accelerator.process_index
        while not self._finish_previous_step():
            self.learning_rates.set(progress.schedule_step)
            torch.manual_seed(derive_seed(self.seed, "dropout", progress.step, rank))
            scalars = self.guard.run_step(batches.at(progress.step))
            progress.step += 1
            if self.train_loss:
                self.train_loss.add(scalars["loss"])
            if progress.step % self.settings.log_every == 0 or progress.step == self.total:
                self.guard.read_all_reports()
                self._log({} if self.guard.last_skipped else scalars)

    def _resume(self) -> Progress:
        """Load the newest intact checkpoint, the same on all processes; a new Progress if there is none."""
        stage = self.stage
        names = hashlib.sha256("\n".join(stage.sample_names).encode()).hexdigest()
        self.identity = {
            **self.metadata,
            **stage.metadata(),
            "training scans": [stage.num_samples, names],
            "samples a step (batch_size * accumulate * processes)": self._samples_per_step,
        }
        if self.accelerator.is_main_process:
            for folder in (self.checkpoints.folder, self.run.weights):
                remove_temporaries(folder)
        newest = [self.checkpoints.newest() if self.accelerator.is_main_process else None]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(newest)
        if newest[0] is None:
            return Progress()
        progress, changed = self.checkpoints.restore(newest[0], stage, self.accelerator.scaler, self.identity)
        # Noise is drawn by the number of a sample, so that another order is another training, too.
        changed = [f"{name} (or an order of them)" if name == "training scans" else name for name in changed]
        if changed and not self.settings.accept_changes:
            raise UserError(
                f"{self.run.path} was trained up to step {progress.step} with another {' and '.join(changed)}: restore "
                "what was changed, use another name=..., or continue with trainer.accept_changes=true"
            )
        return progress

    def _log(self, scalars: Mapping[str, Tensor]) -> None:
        """Log the scalars of a step, averaged over processes, and the numbers of skipped steps if there are any."""
        progress, numbers = self.progress, {}
        if scalars:
            stacked = torch.stack([value.float() for value in scalars.values()])
            if self.accelerator.num_processes > 1:
                stacked = self.accelerator.reduce(stacked, "mean")
            numbers = dict(zip(scalars, stacked.tolist(), strict=True))
        if self.tracker:
            numbers |= {"skipped": progress.skipped} if progress.skipped else {}
            numbers |= {"overflowed": progress.overflowed} if progress.overflowed else {}
            self.tracker.log_scalars(progress.step, {f"train/{name}": value for name, value in numbers.items()})
            self.tracker.log_progress(progress.step, numbers)

    def _finish_previous_step(self) -> bool:
        """Validate, preview, save and stop where due. Returns whether training is finished."""
        progress, settings, step = self.progress, self.settings, self.progress.step
        finished = step >= self.total

        def due(every: int | None) -> bool:
            return every is not None and step > 0 and (finished or step % every == 0)

        if finished or any(map(due, (self.validate_every, settings.preview_every, settings.checkpoint_every))):
            self.guard.read_all_reports()
        if due(self.validate_every) and progress.validated != step:
            self._validate()
        finished = finished or (settings.patience is not None and progress.stale > settings.patience)
        if self.tracker and due(settings.preview_every) and progress.previewed != step:
            with torch.no_grad(), self.stage.averaged():
                self.tracker.log_volumes(step, self.stage.preview())
            progress.previewed = step
        stopping = self._is_stopping()
        if due(settings.checkpoint_every) or stopping or finished:
            self.guard.read_all_reports()
            self._save()
        if stopping:
            # A launcher stops all processes when one exits, so none exits before the checkpoint is written.
            self.accelerator.wait_for_everyone()
            log.warning("stopped by a signal at step %d; the same command resumes", step)
            self.signals.leave()
        return finished

    def _is_stopping(self) -> bool:
        """Whether to stop now. Several processes must stop at the same step, so they go by the shared reports."""
        alone = self.accelerator.num_processes == 1
        return self.signals.received is not None if alone else self.guard.stopping

    def _save(self) -> None:
        """Write a checkpoint, and publish the weights unless those of an earlier validation are to be kept."""
        stage, progress = self.stage, self.progress
        if self.train_loss:
            self.train_loss.store()
        if not self.accelerator.is_main_process:
            return
        try:
            if self.tracker:
                self.tracker.flush()
            if stage.monitor is None or stage.publishes_last or progress.best is None:
                self._publish({})
            if stage.optimizers:  # otherwise there is nothing to resume
                self.checkpoints.save(stage, progress, self.accelerator.scaler, self.identity)
            self.clock.store(progress.step, finished=False)
        except OSError as error:
            raise UserError(
                f"cannot save step {progress.step} ({error.strerror or error}: {error.filename or self.run.path}); "
                f"{self.checkpoints.describe_newest()}: free disk space or make the folder writable, and run the same "
                "command again"
            ) from error

    def _validate(self) -> None:
        """Validate; publish the weights if they are the best so far, otherwise count towards `patience`."""
        stage, progress = self.stage, self.progress
        with torch.no_grad(), stage.averaged():
            metrics = stage.validate()
        if self.train_loss:
            metrics |= self.train_loss.take()
        progress.validated = progress.step
        if self.tracker and metrics:
            self.tracker.log_scalars(progress.step, {f"val/{name}": value for name, value in metrics.items()})
            log.info("  validation: %s", "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        if stage.monitor is None or stage.monitor.metric not in metrics:
            return
        value = metrics[stage.monitor.metric]
        if math.isfinite(value) and stage.monitor.improved(value, progress.best):
            progress.best, progress.best_step, progress.stale = value, progress.step, 0
            if self.accelerator.is_main_process and not stage.publishes_last:
                self._publish(metrics)
        else:
            progress.stale += 1

    def _publish(self, metrics: Mapping[str, float]) -> None:
        """Write the weights for later stages, with the metrics they reached."""
        stage, step = self.stage, self.progress.step
        weights = stage.weights()
        for name, tensors in weights.items():
            refuse_non_finite(tensors, name, step, self.checkpoints.describe_newest())
        self.run.publish(
            weights, {"stage": stage.name, "step": step, "metrics": metrics, **self.metadata, **stage.metadata()}
        )
