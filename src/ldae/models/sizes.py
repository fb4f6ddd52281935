"""Sizes that fit: a volume must divide by the autoencoder's strides, its latent by the U-Net's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ldae.utils.errors import UserError

AXES = "xyz"


def check_divisible(shape: Sequence[int], strides: Sequence[int], what: str) -> None:
    """Refuse sizes (X, Y, Z) that `strides` do not divide.

    Raises:
        UserError: names the axis and the nearest sizes that would do.
    """
    for axis, size, stride in zip(AXES, shape, strides, strict=True):
        if size % stride or size == 0:
            near = f"{max(size // stride, 1) * stride} or {(size // stride + 1) * stride}"
            raise UserError(f"{what} {list(shape)}: size {size} along {axis} does not divide by {stride}; use {near}")


def latent_sizes(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """(X', Y', Z') of the latent of a volume (X, Y, Z)."""
    return tuple(size // stride for size, stride in zip(shape, strides, strict=True))


def check_strides(shape: Sequence[int], autoencoder: Sequence[int], unet: Sequence[int]) -> None:
    """Refuse a volume (X, Y, Z) that the two networks' strides together do not divide."""
    strides = [a * b for a, b in zip(autoencoder, unet, strict=True)]
    check_divisible(shape, strides, "data.shape")


def check_volume_shape(shape: Sequence[int], autoencoder: Any, unet: Any) -> None:
    """The same for networks given as configs, before anything is trained or read.

    Args:
        shape: (X, Y, Z) of the volumes.
        autoencoder, unet: config nodes, built without memory on the meta device; or modules; or strides.
    """
    first, second = (build_on_meta(node) for node in (autoencoder, unet))
    check_strides(shape, getattr(first, "strides", first), getattr(second, "strides", second))


def build_on_meta(node: Any) -> Any:
    """A config node's module on the meta device: its shapes without its memory. Anything else as it is."""
    from hydra.utils import instantiate
    from omegaconf import DictConfig

    if isinstance(node, nn.Module) or not isinstance(node, DictConfig | dict):
        return node
    with torch.device("meta"):
        return instantiate(node)
