"""What a stage is to the trainer, and the one optimiser step that all stages share.

A step never reads a value back from the device. Whether it is taken is decided there, from the losses and the gradient
norm; the host learns of it one step later (guard.py).
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldae.config import Optim, TrainerSettings
from ldae.training.bf16_check import guard_bf16
from ldae.training.ema import Ema
from ldae.training.health import Batch, BufferBackup


@dataclass(frozen=True)
class Monitor:
    """The validation metric whose best value decides which weights are published."""

    metric: str
    higher_is_better: bool

    def improved(self, value: float, best: float | None) -> bool:
        """Whether `value` is better than the best so far."""
        if best is None:
            return True
        return value > best if self.higher_is_better else value < best


@dataclass(frozen=True)
class StepResult:
    """What an optimiser step leaves on the device. Nothing of it has been read back to the host.

    Attributes:
        scalars: 0-d tensors to log by name, means over the micro-batches; 'loss' and 'gradient_norm' among them.
        skipped: 0-d float32, the same on all processes: 1 if a loss or gradient was not finite, so that no weight,
            moment or average has moved; else 0.
        bad_loss: 0-d float32, the same on all processes: 1 if a loss was not finite, 0 if at most the gradient was.
        finite: (micro-batches,) bool, whether each loss of this process was finite.
    """

    scalars: dict[str, Tensor]
    skipped: Tensor
    bad_loss: Tensor
    finite: Tensor


class Stage(ABC):
    """One stage of the method.

    It owns its modules, optimisers and averages by name, and the whole of an optimiser step: forward, backward and
    update, through Accelerate (a GAN needs that). The trainer owns the cadence only.
    """

    name: ClassVar[str]
    monitor: Monitor | None = None  # None: publish the last weights, never stop early
    publishes_last: bool = False  # `monitor` then decides about early stopping alone

    accelerator: Accelerator  # from `prepare` on
    modules: dict[str, nn.Module]  # trained; what a checkpoint holds
    published: tuple[str, ...]  # the modules that later stages need
    optimizers: dict[str, torch.optim.Optimizer]
    averages: dict[str, Ema]
    length: int  # training samples
    names: Sequence[str] = ()  # of the training samples, for people

    @abstractmethod
    def prepare(self, accelerator: Accelerator, trainer: TrainerSettings, optim: Optim, seed: int) -> None:
        """Place the modules on the device, wrap what is trained, and build the optimisers and averages."""

    def fetch(self, index: np.ndarray, position: np.ndarray, number: int) -> Batch:
        """CPU tensors of a micro-batch: what is read, and what is drawn. Called in threads, ahead of the step.

        Args:
            index: (B,) training samples.
            position: (B,) their global places in the sample stream, which key the draws.
            number: of the micro-batch, the same on all processes.
        """
        return {}

    @abstractmethod
    def run_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """One optimiser step over `micro_batches`. No value is read back: the host runs ahead of the device."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Validation metrics with the weights that would be published, the same on every process."""

    def take_step(self, step: int, *updates: tuple["Updater", "AccumulatedGradients"]) -> StepResult:
        """Apply the gradients of optimiser step `step`, of all optimisers or of none, then move the averages."""
        result = apply_all_or_none(self.accelerator, *updates)
        for ema in self.averages.values():
            ema.update(step, result.skipped)
        return result

    def preview(self) -> dict[str, Tensor]:
        """Volumes (N, 1, X, Y, Z) to look at, by title."""
        return {}

    def name_of(self, index: int) -> str:
        """How to call training sample `index` before people."""
        return self.names[index] if index < len(self.names) else f"sample {index}"

    def metadata(self) -> dict[str, Any]:
        """What later stages must know besides the weights."""
        return {}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The tensors to publish: the average of a module where it has one."""
        return {name: (self.averages.get(name) or self.modules[name]).state_dict() for name in self.published}

    @contextlib.contextmanager
    def averaged(self) -> Any:
        """Inside, the modules hold what would be published, in eval mode."""
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


@dataclass(frozen=True)
class AccumulatedGradients:
    """One optimiser's gradients of a step, clipped and not yet applied; all tensors are on the device."""

    scalars: dict[str, Tensor]
    finite: Tensor  # (micro-batches,) bool, of the losses
    usable: Tensor  # 0-d bool, whether losses and gradient are finite


class Updater:
    """Accumulates the gradients of one optimiser over the micro-batches of a step, and applies them."""

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None
    ) -> None:
        self.accelerator = accelerator
        self.module = module
        self.optimizer = optimizer
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.clip = clip if clip is not None else float("inf")
        self.buffers = BufferBackup(module)
        if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
            guard_bf16(module)

    def accumulate(
        self, micro_batches: Sequence[Batch], loss: Callable[[Batch], dict[str, Tensor]]
    ) -> AccumulatedGradients:
        """Backward over the micro-batches, then clipping. `loss(batch)` returns scalars; 'loss' is minimised."""
        self.buffers.save()
        totals: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            # Processes exchange gradients once, with the last micro-batch.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                scalars = loss(batch)
                self.accelerator.backward(scalars["loss"] / len(micro_batches))
            losses.append(scalars["loss"].detach())
            for name, value in scalars.items():
                totals[name] = totals.get(name, 0) + value.detach() / len(micro_batches)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip).detach()
        finite = torch.isfinite(torch.stack(losses))
        return AccumulatedGradients({**totals, "gradient_norm": norm}, finite, finite.all() & torch.isfinite(norm))

    def apply(self, skipped: Tensor) -> None:
        """Take the optimiser's step, or leave everything as it is where `skipped` (0-d float32) is 1.

        The fused optimisers decide on the device (their `found_inf`), so that the host need not wait for the answer.
        """
        self.optimizer.found_inf = skipped
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.buffers.restore(skipped)


def apply_all_or_none(accelerator: Accelerator, *updates: tuple[Updater, AccumulatedGradients]) -> StepResult:
    """Take the step of all optimisers, or of none if any of them, in any process, met a non-finite loss or gradient."""
    finite = torch.stack([accumulated.finite for _, accumulated in updates]).all(dim=0)
    usable = torch.stack([accumulated.usable for _, accumulated in updates]).all()
    flags = 1 - torch.stack([usable, finite.all()]).float()
    if accelerator.num_processes > 1:
        flags = accelerator.reduce(flags, "sum").clamp(max=1)
    skipped, bad_loss = flags.unbind()
    for updater, _ in updates:
        updater.apply(skipped)
    if accelerator.scaler is not None:
        _rescale(accelerator.scaler, bad_loss)
    scalars: dict[str, Tensor] = {}
    for _, accumulated in reversed(updates):  # the first one's 'loss' and 'gradient_norm' are the step's
        scalars |= accumulated.scalars
    return StepResult(scalars, skipped, bad_loss, finite)


def _rescale(scaler: torch.amp.GradScaler, bad_loss: Tensor) -> None:
    """The scaler's step after a step; a loss that is no number leaves the scale alone: lowering it would not help."""
    one = torch.ones_like(bad_loss)
    before = scaler.scale(one)
    scaler.update()
    scaler.update(torch.where(bad_loss > 0, before, scaler.scale(one)))


def batch_to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`; from pinned memory, the copies do not hold up the host."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def uses_channels_last(trainer: TrainerSettings, accelerator: Accelerator, latents: bool = True) -> bool:
    """Whether networks and their inputs lie channels-last in memory: as the config says, or as was measured.

    Measured (docs/bench.md): on CPUs it is faster for volumes; on a GPU a step of stage 2 takes a fifth longer, as
    PyTorch's group norm there goes back and forth between the layouts. On CPUs never for latents: the backward pass of
    PyTorch's GroupNorm crashes in that layout when its input needs no gradient (seen with 2.13, bf16).
    """
    on_cpu = accelerator.device.type == "cpu"
    wanted = on_cpu if trainer.channels_last is None else trainer.channels_last
    return wanted and not (latents and on_cpu)


def to_memory_format(tensor: Tensor, channels_last: bool) -> Tensor:
    """A tensor of channels-last layout, if asked for: 3-D convolutions' tensors have five axes, 2-D ones' have four."""
    if channels_last and tensor.ndim == 5:
        return tensor.to(memory_format=torch.channels_last_3d)
    if channels_last and tensor.ndim == 4:
        return tensor.to(memory_format=torch.channels_last)
    return tensor


def module_to_memory_format(module: nn.Module, channels_last: bool) -> nn.Module:
    """The module with its convolutions' weights in that layout, each by its own number of axes."""
    for parameter in module.parameters():
        parameter.data = to_memory_format(parameter.data, channels_last)
    return module


def build_adam(parameters: Iterable[nn.Parameter] | list[dict[str, Any]], lr: float, optim: Optim) -> torch.optim.Adam:
    """Adam with the config's betas; fused: one pass over memory updates all tensors, and can be told to skip."""
    return torch.optim.Adam(parameters, lr=lr, betas=tuple(optim.betas), weight_decay=optim.weight_decay, fused=True)
