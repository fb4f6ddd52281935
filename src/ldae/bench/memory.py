"""Bytes of a training step, counted without memory and without a GPU: shapes alone go through the real networks.

Every tensor that the forward and backward passes make is followed from its birth to its end (fake tensors, one mode
over all operations), so that temporaries, gradients and checkpointing are in the peak. Not in it: the allocator's
fragmentation, cuDNN's workspace and the driver's context; a tenth of the peak and half a GB are added for them.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldae.losses import autoencoder as losses
from ldae.models.sizes import latent_sizes
from ldae.runs import estimator_node

FLOAT = 4
OVERHEAD, CONTEXT = 1.1, 0.5 * 2**30


@dataclass(frozen=True)
class Footprint:
    """Bytes by what they are for."""

    trained: int  # parameters
    frozen: int
    optimiser: int  # Adam's two moments
    average: int
    passes: int  # activations, gradients and temporaries at their worst
    update: int  # gradients and the update's temporaries, after the activations are gone

    @property
    def peak(self) -> float:
        """What the device must have, overheads included."""
        resident = self.trained + self.frozen + self.optimiser + self.average
        return OVERHEAD * (resident + max(self.passes, self.update)) + CONTEXT

    def numbers(self, gigabytes: float) -> dict[str, float]:
        """Flat names to GB, and whether it fits."""
        parts = {name: getattr(self, name) / 2**30 for name in self.__dataclass_fields__}
        return {**parts, "peak": self.peak / 2**30, "fits": float(self.peak <= gigabytes * 2**30)}


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors alive that were made inside, now and at their worst."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        return result

    def know(self, module: nn.Module) -> None:
        """What is there already does not count."""
        self._known.update(tensor.untyped_storage() for tensor in module.state_dict(keep_vars=True).values())

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._gone, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, size: int) -> None:
        self.now -= size


def _like_cuda(module: nn.Module) -> None:
    """Norms compute in float32 under autocast, as CUDA's list has it and the CPU's has not."""
    for child in module.modules():
        if isinstance(child, nn.GroupNorm | nn.LayerNorm):
            child.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


def _meta(node: Any) -> nn.Module:
    with torch.device("meta"):
        return instantiate(node)


def _size(*modules: nn.Module) -> int:
    return sum(FLOAT * tensor.numel() for module in modules for tensor in module.state_dict().values())


def compute_footprint(
    config: DictConfig, stage: str, batch: int, checkpointing: bool, reduced: bool, ema: bool
) -> Footprint:
    """Of one optimiser step of a stage.

    Args:
        config: a composed config; its model and data.shape count.
        reduced: networks compute in 16 bits.
        ema: whether an average is kept.
    """
    trained, frozen, passes = PASSES[stage](config, batch, checkpointing)
    live = LiveBytes()
    # Built without memory, the networks get fake tensors of a device that has autocast.
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (*trained, *frozen):
            module.to_empty(device="cpu")
            _like_cuda(module)
            live.know(module)
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
        update=2 * gradients,  # the fused loop over tensors holds one more copy
    )


Passes = tuple[list[nn.Module], list[nn.Module], Callable[[Any], None]]


def _latent(config: DictConfig, autoencoder: nn.Module, batch: int) -> Tensor:
    return torch.empty(batch, autoencoder.latent_channels, *latent_sizes(config.data.shape, autoencoder.strides))


def _aekl(config: DictConfig, batch: int, checkpointing: bool) -> Passes:
    autoencoder, discriminator = _meta(config.model.autoencoder), _meta(config.model.discriminator)
    if checkpointing:
        autoencoder.enable_checkpointing()

    def passes(autocast: Any) -> None:
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
    unet, autoencoder = _meta(config.model.unet), _meta(config.model.autoencoder)
    unet.checkpointing = checkpointing

    def passes(autocast: Any) -> None:
        z = _latent(config, autoencoder, batch)
        with autocast():
            output = unet(z, torch.empty(batch))
        output.float().square().mean().backward()

    return [unet], [], passes


def _repr(config: DictConfig, batch: int, checkpointing: bool) -> Passes:
    model = config.model
    autoencoder, unet, encoder = (_meta(model[name]) for name in ("autoencoder", "unet", "encoder"))
    estimator = _meta(estimator_node(model.unet, encoder.dim, model.estimator))
    encoder.checkpointing = estimator.checkpointing = checkpointing

    def passes(autocast: Any) -> None:
        x, z = torch.empty(batch, 1, *config.data.shape), _latent(config, autoencoder, batch)
        with torch.no_grad(), autocast():
            features = unet.features(z, torch.empty(batch))
            unet.head(features)
        with autocast():
            gradient = estimator(features, encoder(x))
        gradient.float().square().mean().backward()

    return [encoder, estimator], [unet.requires_grad_(False), autoencoder.requires_grad_(False)], passes


PASSES: dict[str, Callable[[DictConfig, int, bool], Passes]] = {"aekl": _aekl, "pretrain": _pretrain, "repr": _repr}
