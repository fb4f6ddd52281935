"""One optimiser step: accumulate gradients over micro-batches, clip them, and apply them if they are finite.

No value is read back from the device. Whether the step is applied is decided on the device, from the losses and the
gradient norm; the host learns of the decision one step later (guard.py).
"""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldae.config import Optim
from ldae.data.stream import Batch
from ldae.training.bf16_check import guard_bf16
from ldae.training.health import BufferBackup
from ldae.training.step_graph import StepGraph


@dataclass(frozen=True)
class StepResult:
    """Outcome of an optimiser step, as tensors on the device.

    Attributes:
        scalars: 0-d tensors to log, by name, averaged over the micro-batches; includes "loss" and "gradient_norm".
        skipped: 0-d float32, the same on all processes: 1 if a loss or gradient was not finite and therefore no weight,
            optimiser state or average was changed, else 0.
        bad_loss: 0-d float32, the same on all processes: 1 if a loss was not finite, else 0.
        finite: whether each loss of this process was finite, (micro-batches,) bool.
    """

    scalars: dict[str, Tensor]
    skipped: Tensor
    bad_loss: Tensor
    finite: Tensor


@dataclass(frozen=True)
class AccumulatedGradients:
    """Outcome of the backward passes of one optimiser, whose gradients are clipped and not yet applied.

    Attributes:
        scalars: as in StepResult.
        finite: whether each loss was finite, (micro-batches,) bool.
        usable: whether all losses and the gradient norm are finite, 0-d bool.
    """

    scalars: dict[str, Tensor]
    finite: Tensor
    usable: Tensor


class Updater:
    """Accumulates the gradients of one optimiser over the micro-batches of a step, and applies them.

    Args:
        module: the module as `accelerator.prepare` returned it, whose parameters the optimiser updates.
        clip: largest norm of the gradient; None does not clip.
        record: whether to record the passes as a CUDA graph (step_graph.py). `accumulate` is then always called with
            the same losses, and with micro-batches of the same shapes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        clip: float | None,
        record: bool = False,
    ) -> None:
        self.accelerator = accelerator
        self.module = module
        self.optimizer = optimizer
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.clip = clip if clip is not None else float("inf")
        self.buffers = BufferBackup(module)
        self.graph = StepGraph(accelerator.device) if record else None
        if accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
            guard_bf16(module)

    def accumulate(
        self, micro_batches: Sequence[Batch], loss: Callable[[Batch], dict[str, Tensor]]
    ) -> AccumulatedGradients:
        """Run forward and backward over the micro-batches and clip the gradient.

        Args:
            loss: the 0-d losses of a micro-batch by name; "loss" is minimised, the others are logged.
        """
        self.buffers.save()
        if self.graph is None:
            totals, losses = self._run_passes(micro_batches, loss)
        else:
            totals, losses = self.graph(lambda batches: self._run_passes(batches, loss), micro_batches, self._clear)
            totals = {name: value.clone() for name, value in totals.items()}  # the next step overwrites them
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip).detach()
        finite = torch.isfinite(losses)
        return AccumulatedGradients({**totals, "gradient_norm": norm}, finite, finite.all() & torch.isfinite(norm))

    def _run_passes(
        self, micro_batches: Sequence[Batch], loss: Callable[[Batch], dict[str, Tensor]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Forward and backward passes: the losses by name, averaged, and "loss" of each micro-batch."""
        totals: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for index, batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            # Processes exchange gradients once per step, with the last micro-batch.
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.module):
                scalars = loss(batch)
                self.accelerator.backward(scalars["loss"] / len(micro_batches))
            losses.append(scalars["loss"].detach())
            for name, value in scalars.items():
                totals[name] = totals.get(name, 0) + value.detach() / len(micro_batches)
        return totals, torch.stack(losses)

    def _clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def apply(self, skipped: Tensor) -> None:
        """Take the optimiser step if `skipped` (0-d float32) is 0; if it is 1, leave weights and buffers as they were.

        Fused optimisers take the decision on the device (`found_inf`), so the host does not wait for it.
        """
        self.optimizer.found_inf = skipped
        self.optimizer.step()
        if self.graph is None:  # whose replay overwrites the gradients where they are
            self._clear()
        self.buffers.restore(skipped)


def apply_all_or_none(accelerator: Accelerator, *updates: tuple[Updater, AccumulatedGradients]) -> StepResult:
    """Step all optimisers, or none if a loss or gradient of any of them, in any process, is not finite.

    The "loss" and "gradient_norm" of the result are those of the first update.
    """
    finite = torch.stack([accumulated.finite for _, accumulated in updates]).all(dim=0)
    usable = torch.stack([accumulated.usable for _, accumulated in updates]).all()
    flags = 1 - torch.stack([usable, finite.all()]).float()
    if accelerator.num_processes > 1:
        flags = accelerator.reduce(flags, "sum").clamp(max=1)
    skipped, bad_loss = flags.unbind()
    for updater, _ in updates:
        updater.apply(skipped)
    if accelerator.scaler is not None:
        _update_scale(accelerator.scaler, bad_loss)
    scalars: dict[str, Tensor] = {}
    for _, accumulated in reversed(updates):
        scalars |= accumulated.scalars
    return StepResult(scalars, skipped, bad_loss, finite)


def _update_scale(scaler: torch.amp.GradScaler, bad_loss: Tensor) -> None:
    """Update the fp16 gradient scale after a step, except after a non-finite loss, which a lower scale cannot mend."""
    one = torch.ones_like(bad_loss)
    before = scaler.scale(one)
    scaler.update()
    scaler.update(torch.where(bad_loss > 0, before, scaler.scale(one)))


def build_adam(parameters: Iterable[nn.Parameter] | list[dict[str, Any]], lr: float, optim: Optim) -> torch.optim.Adam:
    """Fused Adam with the betas and weight decay of the config; only the fused form supports `found_inf`."""
    return torch.optim.Adam(parameters, lr=lr, betas=tuple(optim.betas), weight_decay=optim.weight_decay, fused=True)
