"""Memory of a training step, computed without that memory and without a GPU: fake tensors pass the real networks.

The size of every tensor that the forward and backward passes make counts from its creation to its release, so that the
peak contains temporaries, gradients and the effect of checkpointing. It does not contain the allocator's fragmentation,
cuDNN's workspace and the driver's context; a tenth of the peak and half a GB are added for them.

PyTorch's own MemTracker (torch.distributed._tools.mem_tracker) cannot take its place: in PyTorch 2.13 it refuses frozen
parameters, which stages 1 and 3 have. docs/bench.md compares the two, and both with real allocations.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldae.losses import autoencoder as losses
from ldae.models.sizes import build_on_meta, latent_sizes
from ldae.runs import estimator_node

FLOAT = 4  # bytes of a float32
OVERHEAD, CONTEXT = 1.1, 0.5 * 2**30  # factor for fragmentation and workspaces; bytes of the driver


@dataclass(frozen=True)
class Footprint:
    """Bytes that a training step needs, by purpose."""

    trained: int  # parameters and buffers of trained networks
    frozen: int  # those of frozen ones
    optimiser: int  # Adam's two moments
    average: int  # moving average of the weights
    passes: int  # peak of activations, gradients and temporaries
    update: int  # gradients and temporaries of the update, after the activations were released

    @property
    def peak(self) -> float:
        """Bytes that the device must have, including the overhead."""
        resident = self.trained + self.frozen + self.optimiser + self.average
        return OVERHEAD * (resident + max(self.passes, self.update)) + CONTEXT

    def numbers(self, gigabytes: float) -> dict[str, float]:
        """GB by name, and `fits`: 1 if the peak fits into `gigabytes`."""
        parts = {name: getattr(self, name) / 2**30 for name in self.__dataclass_fields__}
        return {**parts, "peak": self.peak / 2**30, "fits": float(self.peak <= gigabytes * 2**30)}


class LiveBytes(TorchDispatchMode):
    """Total size in bytes of the tensors made inside this context that are still alive: now, and its peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def ignore(self, module: nn.Module) -> None:
        """Do not count the tensors of `module`."""
        self._known.update(tensor.untyped_storage() for tensor in module.state_dict(keep_vars=True).values())

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._release, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _release(self, size: int) -> None:
        self.now -= size


def _autocast_norms_as_on_cuda(module: nn.Module) -> None:
    """Let norms compute in float32 under autocast, as on CUDA; the CPU's list of operations leaves them in 16 bits."""
    for child in module.modules():
        if isinstance(child, nn.GroupNorm | nn.LayerNorm):
            child.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def _size(*modules: nn.Module) -> int:
    return sum(FLOAT * tensor.numel() for module in modules for tensor in module.state_dict().values())


def compute_footprint(
    config: DictConfig, stage: str, batch: int, checkpointing: bool, reduced: bool, ema: bool
) -> Footprint:
    """Memory of one optimiser step.

    Args:
        config: a composed config, of which model, data.shape and data.view matter.
        stage: aekl, pretrain or repr.
        batch: samples in a micro-batch.
        checkpointing: whether activations are computed again in the backward pass.
        reduced: whether networks compute in 16 bits.
        ema: whether there is a moving average of the weights.
    """
    trained, frozen, passes = PASSES[stage](config, batch, checkpointing)
    live = LiveBytes()
    # The networks were built without memory; they get fake tensors of a device that has autocast.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (*trained, *frozen):
            module.to_empty(device="cpu")
            _autocast_norms_as_on_cuda(module)
            live.ignore(module)
        with live:
            passes(lambda: torch.autocast("cpu", torch.bfloat16, enabled=reduced))
    gradients = sum(FLOAT * p.numel() for module in trained for p in module.parameters())
    size = _size(*trained)
    return Footprint(
        trained=size,
        frozen=_size(*frozen),
        optimiser=2 * gradients,
        average=size if ema else 0,
        passes=live.peak,
        update=2 * gradients,  # the fused loop over tensors makes one more copy
    )


Autocast = Callable[[], torch.autocast]  # makes the context in which the networks compute
# Trained networks, frozen networks, and the forward and backward passes of a step.
Passes = tuple[list[nn.Module], list[nn.Module], Callable[[Autocast], None]]


def _latent(config: DictConfig, autoencoder: nn.Module, batch: int) -> Tensor:
    return torch.empty(batch, autoencoder.latent_channels, *latent_sizes(config.data.shape, autoencoder.strides))


def _aekl(config: DictConfig, batch: int, checkpointing: bool) -> Passes:
    autoencoder, discriminator = build_on_meta(config.model.autoencoder), build_on_meta(config.model.discriminator)
    if checkpointing:
        autoencoder.enable_checkpointing()

    def passes(autocast: Autocast) -> None:
        x = torch.empty(batch, 1, *config.data.shape)
        discriminator.requires_grad_(False)
        with autocast():
            reconstruction, mean, std = autoencoder(x, _latent(config, autoencoder, batch))
            scores = discriminator(reconstruction)[-1]
        loss = losses.reconstruction_l1(reconstruction, x) + losses.kl_divergence(mean, std)
        (loss + losses.generator_adversarial(scores.float())).backward()
        reconstruction = reconstruction.detach()
        del loss, scores, mean, std
        autoencoder.zero_grad()
        discriminator.requires_grad_(True)
        with autocast():
            real, fake = discriminator(torch.cat([x, reconstruction.float()]))[-1].chunk(2)
        losses.discriminator_adversarial(real.float(), fake.float()).backward()

    return [autoencoder, discriminator], [], passes


def _pretrain(config: DictConfig, batch: int, checkpointing: bool) -> Passes:
    unet, autoencoder = build_on_meta(config.model.unet), build_on_meta(config.model.autoencoder)
    unet.checkpointing = checkpointing

    def passes(autocast: Autocast) -> None:
        z = _latent(config, autoencoder, batch)
        with autocast():
            output = unet(z, torch.empty(batch))
        output.float().square().mean().backward()

    return [unet], [], passes


def _repr(config: DictConfig, batch: int, checkpointing: bool) -> Passes:
    model = config.model
    autoencoder, unet, encoder = (build_on_meta(model[name]) for name in ("autoencoder", "unet", "encoder"))
    estimator = build_on_meta(estimator_node(model.unet, encoder.dim, model.estimator))
    encoder.checkpointing = estimator.checkpointing = checkpointing

    def passes(autocast: Autocast) -> None:
        view = config.data.view
        x, z = torch.empty(batch, view.channels, *view.shape), _latent(config, autoencoder, batch)
        with torch.no_grad(), autocast():
            features = unet.features(z, torch.empty(batch))
            unet.head(features)
        with autocast():
            gradient = estimator(features, encoder(x))
        gradient.float().square().mean().backward()

    return [encoder, estimator], [unet.requires_grad_(False), autoencoder.requires_grad_(False)], passes


PASSES: dict[str, Callable[[DictConfig, int, bool], Passes]] = {"aekl": _aekl, "pretrain": _pretrain, "repr": _repr}
