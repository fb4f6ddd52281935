"""The loop. It owns the cadence: log, validate, preview, checkpoint, stop; a stage owns the step.

Housekeeping comes before a step, so that what is saved is always between two steps. The data order, the noise and
the dropout of a step are functions of (seed, step), so that a resumed run needs no generator's state.
"""

import logging
import math
import signal
import sys
from typing import Any

import torch
from accelerate import Accelerator

from ldae.config import Optim
from ldae.config import Trainer as Settings
from ldae.data.stream import Batches, SampleStream
from ldae.errors import UserError
from ldae.noise import derive
from ldae.runs import Run
from ldae.training.checkpoint import Checkpoints, Progress
from ldae.training.stage import Stage
from ldae.training.tracking import Tracker

log = logging.getLogger(__name__)
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: a scheduler may start the same command again


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
        self._signal: int | None = None

    def total_steps(self, length: int) -> int:
        """Optimiser steps of the whole run; epochs are converted with the global batch size."""
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        if self.settings.max_epochs is None:
            raise UserError("trainer.max_steps or trainer.max_epochs must be given")
        batch = self.settings.batch_size * self.settings.accumulate * self.accelerator.num_processes
        return math.ceil(self.settings.max_epochs * length / batch)

    def fit(self, stage: Stage, metadata: dict[str, Any]) -> Progress:
        """Train `stage`, publish its weights with `metadata`, and return where it ended."""
        stage.prepare(self.accelerator, self.settings, self.optim, self.seed)
        base_lrs = {name: [g["lr"] for g in o.param_groups] for name, o in stage.optimizers.items()}
        progress = self.checkpoints.restore(stage, self.accelerator.scaler)
        total = self.total_steps(stage.length)
        if progress.step:
            log.info("resuming %s at step %d of %d", stage.name, progress.step, total)
        main = self.accelerator.is_main_process
        tracker = Tracker(self.run.path, stage.name, progress.step, total) if main else None
        stream = SampleStream(stage.length, self.seed)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        batches = Batches(stage.fetch, stream, self.settings.batch_size, self.settings.accumulate, rank, world)
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
        try:
            while True:
                patient = self._housekeeping(stage, progress, total, metadata, tracker)
                if progress.step >= total or not patient:
                    break
                self._set_learning_rates(stage, base_lrs, progress.step, total)
                torch.manual_seed(derive(self.seed, "dropout", progress.step, rank))
                scalars = stage.run_step(batches.at(progress.step), progress.step)
                progress.step += 1
                if tracker and (progress.step % self.settings.log_every == 0 or progress.step == total):
                    values = {f"train/{name}": float(value) for name, value in scalars.items()}
                    tracker.scalars(progress.step, values)
                    tracker.progress(progress.step, {name: float(value) for name, value in scalars.items()})
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            batches.close()
            if tracker:
                tracker.close()
        log.info("%s ends at step %d; weights in %s", stage.name, progress.step, self.run.weights)
        return progress

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._signal is not None:
            sys.exit(128 + number)
        self._signal = number

    def _set_learning_rates(self, stage: Stage, base: dict[str, list[float]], step: int, total: int) -> None:
        factor = learning_rate_factor(step, total, self.optim)
        for name, optimizer in stage.optimizers.items():
            for group, lr in zip(optimizer.param_groups, base[name], strict=True):
                group["lr"] = lr * factor

    def _housekeeping(
        self, stage: Stage, progress: Progress, total: int, metadata: dict[str, Any], tracker: Tracker | None
    ) -> bool:
        """Validate, preview and save where due. False when patience is at its end."""
        step, settings = progress.step, self.settings
        last = step >= total

        def due(every: int | None) -> bool:
            return every is not None and step > 0 and (last or step % every == 0)

        if due(settings.validate_every) and progress.validated != step:
            self._validate(stage, progress, metadata, tracker)
        patient = settings.patience is None or progress.stale <= settings.patience
        last = last or not patient
        if tracker and due(settings.preview_every):
            with torch.no_grad(), stage.averaged():
                tracker.volumes(step, stage.preview())
        stopping = self._stop_requested()
        if (due(settings.checkpoint_every) or stopping or last) and self.accelerator.is_main_process:
            if stage.monitor is None or progress.best is None:
                self._publish(stage, progress, metadata, {})
            self.checkpoints.save(stage, progress, self.accelerator.scaler)
        if stopping:
            log.warning("stopped by signal at step %d; the same command resumes", step)
            sys.exit(EXIT_PREEMPTED)
        return patient

    def _stop_requested(self) -> bool:
        """Whether any process was told to stop: all must leave at the same step."""
        if self.accelerator.num_processes == 1:
            return self._signal is not None
        flag = torch.tensor([float(self._signal is not None)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item() > 0)

    def _validate(self, stage: Stage, progress: Progress, metadata: dict[str, Any], tracker: Tracker | None) -> None:
        with torch.no_grad(), stage.averaged():
            metrics = stage.validate()
        progress.validated = progress.step
        if tracker and metrics:
            tracker.scalars(progress.step, {f"val/{name}": value for name, value in metrics.items()})
            log.info("  validation: %s", "  ".join(f"{name} {value:.4g}" for name, value in metrics.items()))
        if stage.monitor is None or stage.monitor.metric not in metrics:
            return
        value = metrics[stage.monitor.metric]
        if math.isfinite(value) and stage.monitor.improved(value, progress.best):
            progress.best, progress.best_step, progress.stale = value, progress.step, 0
            if self.accelerator.is_main_process:
                self._publish(stage, progress, metadata, metrics)
        else:
            progress.stale += 1

    def _publish(self, stage: Stage, progress: Progress, metadata: dict[str, Any], metrics: dict[str, float]) -> None:
        about = {"stage": stage.name, "step": progress.step, "metrics": metrics, **metadata, **stage.metadata()}
        self.run.publish(stage.weights(), about)
