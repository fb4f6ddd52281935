"""The yardstick: what a plain reading of the paper would write. The same functions of the same weights, less cleverly.

Plain softmax attention, contiguous tensors, files read when they are needed, one tensor after the other in the average,
PyTorch's default Adam. On a GPU fp16 autocast, on a CPU float32.
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
from ldae.models.cpu_kernels import CPU_KERNELS
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
    """The module as it is defined, without CPU kernels and with plain attention. Its parameters and names stay."""
    remove_kernels(module, CPU_KERNELS)
    return use_kernels(module, {Attention: PlainAttention}).to(memory_format=torch.contiguous_format)


class PlainEma(Ema):
    """One tensor after the other."""

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
    """One tensor after the other, as PyTorch does by default; a step that is not finite is read back and left out."""

    def step(self, closure: None = None) -> None:
        """See torch.optim.Adam, whose fused form alone knows `found_inf`."""
        found = vars(self).pop("found_inf", None)
        vars(self).pop("grad_scale", None)
        if found is None or not bool(found):
            super().step(closure)


def use_plain_updates(stage: Stage) -> None:
    """After `prepare`: plain optimisers and averages."""
    for optimizer in stage.optimizers.values():
        for group in optimizer.param_groups:
            group["fused"] = None
        optimizer.__class__ = PlainAdam
        optimizer._step_supports_amp_scaling = False  # torch's sign for a scaler: it divides gradients itself
    stage.averages = {name: PlainEma(ema.module, ema.decay, ema.warmup) for name, ema in stage.averages.items()}


class WaitingTime:
    """Seconds spent on files; read and reset by whoever times a step."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.perf_counter() - self._start


@dataclass(frozen=True)
class NpzVolumes:
    """Volumes read from NPZ files, one after the other, when a batch is asked for."""

    files: Sequence[Path]
    waiting: WaitingTime
    shape: tuple[int, int, int]

    def batch(self, indices: Iterable[int]) -> Tensor:
        """(B, 1, X, Y, Z) float32."""
        return self.read_stored(indices)

    def decode(self, stored: Tensor) -> Tensor:
        """The files hold float32 already."""
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
    """Latents read from their files when a batch is asked for."""

    waiting: WaitingTime | None = None

    @classmethod
    def of(cls, latents: LatentSet, waiting: WaitingTime) -> "NpzLatents":
        """The same latents, from their files."""
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
        """Only the scale has a place."""
        return NpzLatents(**{**vars(self), "scale": self.scale.to(device)})


def build_port_accelerator() -> Accelerator:
    """fp16 autocast on a GPU, as published; float32 on a CPU. PyTorch's backends as they are by default."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.benchmark = False
    return Accelerator(mixed_precision="fp16" if torch.cuda.is_available() else "no")
