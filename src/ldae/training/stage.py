"""The interface between a stage of the method and the trainer."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor, nn

from ldae.config import Optim, TrainerSettings
from ldae.data.stream import Batch
from ldae.training.ema import Ema
from ldae.training.optimizer_step import AccumulatedGradients, StepResult, Updater, apply_all_or_none


@dataclass(frozen=True)
class Monitor:
    """The validation metric that decides which weights are published and when training stops early."""

    metric: str
    higher_is_better: bool

    def improved(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than the best so far; True if there is none."""
        if best is None:
            return True
        return value > best if self.higher_is_better else value < best


class Stage(ABC):
    """One stage of the method.

    A stage builds its modules, optimisers and moving averages, keeps them by name, and performs a whole optimiser step
    through Accelerate: forward, backward and update. The trainer decides when to log, validate, save and stop.

    Attributes:
        name: name of the stage and of its folder, `runs/<name>/<stage>`.
        reads_scans: whether its constructor takes a cohort. A stage that does not reads its `latents` alone, and can be
            trained on a machine without the scans.
        reads_views: whether it also reads what the semantic encoder sees of each scan, `cohort.views`.
        harmless_on_resume: keys of its config that may change when a run is resumed.
        monitor: metric for choosing weights and stopping early; None publishes the last weights and never stops early.
        publishes_last: publish the last weights; `monitor` then decides about early stopping only.
        accelerator: set by `prepare`.
        modules: the trained modules; with the optimisers and averages, what a checkpoint contains.
        published: names of the modules that later stages need.
        optimizers: by name.
        averages: moving averages of weights, by the name of their module.
        num_samples: number of training samples.
        sample_names: human-readable names of the training samples, for log messages.
    """

    name: ClassVar[str]
    reads_scans: ClassVar[bool] = True
    reads_views: ClassVar[bool] = False
    harmless_on_resume: ClassVar[tuple[str, ...]] = ()
    monitor: Monitor | None = None
    publishes_last: bool = False

    accelerator: Accelerator
    modules: dict[str, nn.Module]
    published: tuple[str, ...]
    optimizers: dict[str, torch.optim.Optimizer]
    averages: dict[str, Ema]
    num_samples: int
    sample_names: Sequence[str] = ()

    @classmethod
    def folder(cls, node: DictConfig) -> str:
        """Folder of the run below `runs/<name>`, of a stage with the config `node`."""
        return cls.name

    @abstractmethod
    def prepare(self, accelerator: Accelerator, trainer: TrainerSettings, optim: Optim, seed: int) -> None:
        """Move the modules to the device, wrap those that are trained, and build optimisers and averages."""

    def fetch(self, index: np.ndarray, position: np.ndarray, number: int) -> Batch:
        """A micro-batch as CPU tensors: data and random draws. Called in threads, ahead of the step that uses it.

        Args:
            index: numbers of the training samples, (B,).
            position: their positions in the sample stream of all processes, (B,); they determine the random draws.
            number: number of the micro-batch, the same on all processes.
        """
        return {}

    @abstractmethod
    def run_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """Optimiser step number `step` over `micro_batches`. It reads no value back from the device."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Validation metrics of the weights that would be published, the same on all processes."""

    def take_step(self, step: int, *updates: tuple[Updater, AccumulatedGradients]) -> StepResult:
        """Apply the gradients of optimiser step `step`, of all optimisers or of none, and update the averages."""
        result = apply_all_or_none(self.accelerator, *updates)
        for ema in self.averages.values():
            ema.update(step, result.skipped)
        return result

    def preview(self) -> dict[str, Tensor]:
        """Volumes (N, 1, X, Y, Z) to display in TensorBoard, by title."""
        return {}

    def sample_name(self, index: int) -> str:
        """Human-readable name of training sample `index`."""
        return self.sample_names[index] if index < len(self.sample_names) else f"sample {index}"

    def metadata(self) -> dict[str, Any]:
        """Facts that later stages need besides the weights; stored in metadata.json and compared on resume."""
        return {}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The tensors to publish, by module: its moving average if it has one, else its own weights."""
        return {name: (self.averages.get(name) or self.modules[name]).state_dict() for name in self.published}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Context in which the modules have the weights that would be published and are in eval mode."""
        with contextlib.ExitStack() as stack:
            for ema in self.averages.values():
                stack.enter_context(ema.applied())
            modes = {name: module.training for name, module in self.modules.items()}
            for module in self.modules.values():
                module.eval()
            try:
                yield
            finally:
                for name, module in self.modules.items():
                    module.train(modes[name])
