"""What a stage is to the trainer, and the one optimiser step that all stages share."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldae.config import Optim, Trainer
from ldae.training.ema import Ema
from ldae.training.health import Batch, NonFiniteStep


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


class Stage(ABC):
    """One stage of the method.

    It owns its modules, optimisers and averages by name, and the whole of an optimiser step: forward, backward and
    update, through Accelerate (a GAN needs that). The trainer owns the cadence only.
    """

    name: ClassVar[str]
    monitor: Monitor | None = None  # None: the last weights are published

    modules: dict[str, nn.Module]  # trained; what a checkpoint holds
    published: tuple[str, ...]  # the modules that later stages need
    optimizers: dict[str, torch.optim.Optimizer]
    averages: dict[str, Ema]
    length: int  # training samples
    names: Sequence[str] = ()  # of the training samples, for people

    @abstractmethod
    def prepare(self, accelerator: Accelerator, trainer: Trainer, optim: Optim, seed: int) -> None:
        """Place the modules on the device, wrap what is trained, and build the optimisers and averages."""

    def fetch(self, indices: np.ndarray) -> Batch:
        """The tensors of the training samples `indices`, besides their index and position."""
        return {}

    @abstractmethod
    def run_step(self, micro_batches: Sequence[Batch], step: int) -> dict[str, Tensor | float]:
        """One optimiser step over `micro_batches`; returns scalars to log."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Validation metrics with the weights that would be published, the same on every process."""

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


class Updater:
    """Backward over micro-batches, clipping and one step of one optimiser; or none, if the loss or gradient is bad."""

    def __init__(
        self, accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None
    ) -> None:
        self.accelerator = accelerator
        self.module = module
        self.optimizer = optimizer
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.clip = clip if clip is not None else float("inf")
        self.skipped = 0

    def __call__(self, micro_batches: Sequence[Batch], loss: Callable[[Batch], dict[str, Tensor]]) -> dict[str, Tensor]:
        """`loss(batch)` returns scalars, of which 'loss' is minimised. Returns their means over the micro-batches.

        Raises:
            NonFiniteStep: on all processes alike; nothing has moved.
        """
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
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.clip)
        finite = torch.isfinite(torch.stack(losses))
        good = self._agree(bool(finite.all()) and self._usable(norm))
        if good:
            self.optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if not good:
            self.skipped += 1
            bad = [batch for batch, fine in zip(micro_batches, finite.tolist(), strict=True) if not fine]
            gradient_alone = self._agree(bool(finite.all()))
            raise NonFiniteStep(micro_batches if gradient_alone else bad)
        return {**totals, "gradient_norm": norm.detach()}

    def _usable(self, norm: Tensor) -> bool:
        """fp16 overflows by design: its scaler skips such a step itself and lowers the scale, until nothing is left."""
        scaler = self.accelerator.scaler
        return bool(torch.isfinite(norm)) or (scaler is not None and scaler.get_scale() >= 1)

    def _agree(self, good: bool) -> bool:
        """Whether all processes say so."""
        if self.accelerator.num_processes == 1:
            return good
        bad = torch.tensor([float(not good)], device=self.accelerator.device)
        return self.accelerator.reduce(bad, "sum").item() == 0


def memory_format(trainer: Trainer, accelerator: Accelerator, latents: bool = True) -> torch.memory_format:
    """Channels-last where it is asked for, safe and faster.

    On CPUs, volumes alone: the backward pass of PyTorch's GroupNorm crashes in that layout when its input needs no
    gradient, as the frozen trunk's features (seen with 2.13, bf16), and small grids gain nothing.
    """
    fits = trainer.channels_last and not (latents and accelerator.device.type == "cpu")
    return torch.channels_last_3d if fits else torch.contiguous_format


def adam(parameters: Iterable[nn.Parameter] | list[dict[str, Any]], lr: float, optim: Optim) -> torch.optim.Adam:
    """Adam with the config's betas; fused, so that one pass over memory updates all tensors."""
    return torch.optim.Adam(parameters, lr=lr, betas=tuple(optim.betas), weight_decay=optim.weight_decay, fused=True)
