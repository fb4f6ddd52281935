"""The straight port that the bench compares with: a plain implementation of the same functions of the same weights.

It has plain softmax attention, contiguous tensors, files that are read when they are needed, and an average and an Adam
that update one tensor after the other; fp16 autocast on a GPU and float32 on a CPU.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldae.data.latent_npz import read_npz
from ldae.data.latents import LatentSet
from ldae.models.blocks import Attention
from ldae.models.placement import remove_kernels, use_kernels
from ldae.training.ema import Ema
from ldae.training.stage import Stage


class PlainAttention(Attention):
    """softmax(q k^T / sqrt(C)) v, with the whole matrix of weights in memory."""

    def forward(self, x: Tensor, time: Tensor | None = None, semantic: Tensor | None = None) -> Tensor:
        """(B, C, X, Y, Z) -> the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, L, C)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)  # (B, heads, L, L)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        return x + self.projection(mixed).transpose(1, 2).unflatten(2, x.shape[2:])


def use_plain_kernels(module: nn.Module) -> nn.Module:
    """Let `module` compute as it is defined, without kernels of ours, and with plain attention; its parameters stay."""
    remove_kernels(module)
    return use_kernels(module, {Attention: PlainAttention}).to(memory_format=torch.contiguous_format)


class PlainEma(Ema):
    """A moving average that is updated one tensor after the other."""

    @torch.no_grad()
    def update(self, step: int, skipped: Tensor | None = None) -> None:
        """See Ema."""
        if skipped is not None and bool(skipped):
            return
        decay = self.decay_at(step)
        for name, tensor in self.module.state_dict().items():
            if tensor.is_floating_point():
                self.shadow[name].mul_(decay).add_(tensor, alpha=1 - decay)
            else:
                self.shadow[name].copy_(tensor)


class PlainAdam(torch.optim.Adam):
    """Adam as PyTorch does it on CPUs by default, one tensor after the other; whether to skip a step is read back."""

    def step(self, closure: None = None) -> None:
        """See torch.optim.Adam. `found_inf`, by which the stages skip a step, is known to the fused Adam only."""
        found = vars(self).pop("found_inf", None)
        vars(self).pop("grad_scale", None)
        if found is None or not bool(found):
            super().step(closure)


def use_plain_updates(stage: Stage) -> None:
    """Replace the optimisers and averages of a stage by plain ones, after `prepare`."""
    for optimizer in stage.optimizers.values():
        for group in optimizer.param_groups:
            group["fused"] = None
        optimizer.__class__ = PlainAdam
        optimizer._step_supports_amp_scaling = False  # tells PyTorch's gradient scaler to unscale the gradients itself
    stage.averages = {name: PlainEma(ema.module, ema.decay, ema.warmup) for name, ema in stage.averages.items()}


class WaitingTime:
    """Seconds spent on reading files; whoever times a step reads and resets them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._start


@dataclass(frozen=True)
class NpzVolumes:
    """Volumes that are read from NPZ files, one after the other, when a batch is needed."""

    files: Sequence[Path]
    waiting: WaitingTime
    shape: tuple[int, int, int]

    def batch(self, indices: Iterable[int]) -> Tensor:
        """(B, 1, X, Y, Z) float32."""
        return self.read_stored(indices)

    def decode(self, stored: Tensor) -> Tensor:
        """`stored` itself: the files contain float32."""
        return stored

    def read_stored(self, indices: Iterable[int]) -> Tensor:
        """(B, 1, X, Y, Z) float32."""
        with self.waiting:
            volumes = []
            for index in indices:
                with np.load(self.files[int(index)]) as archive:
                    volumes.append(torch.from_numpy(archive["x"]).float()[None])
            return torch.stack(volumes)


@dataclass(frozen=True)
class NpzLatents(LatentSet):
    """Latents that are read from their files when a batch is needed."""

    waiting: WaitingTime | None = None

    @classmethod
    def of(cls, latents: LatentSet, waiting: WaitingTime) -> "NpzLatents":
        """The same latents, read from their files."""
        return cls(**vars(latents), waiting=waiting)

    def sample(self, rows: Tensor | np.ndarray, noise: Tensor) -> Tensor:
        """See LatentSet."""
        with self.waiting:
            pairs = [read_npz(self.table["latent_path"].iloc[int(row)]) for row in rows]
            mean, std = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
        device = self.scale.device
        scale = self.scale.view(1, -1, 1, 1, 1)
        return scale * (mean.to(device) + std.to(device) * noise.to(device))

    def to(self, device: torch.device) -> "NpzLatents":
        """The same latents with their scale on `device`; the others stay in files."""
        return NpzLatents(**{**vars(self), "scale": self.scale.to(device)})


def build_port_accelerator() -> Accelerator:
    """An accelerator with fp16 autocast on a GPU, as published, and float32 on a CPU; PyTorch's default backends."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    return Accelerator(mixed_precision="fp16" if torch.cuda.is_available() else "no")
