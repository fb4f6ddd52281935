"""Sizes that fit: the strides of the autoencoder divide a volume's sizes, and the U-Net's divide the latent's."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from ldae.utils.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

AXES = "xyz"


def check_divisible(shape: Sequence[int], strides: Sequence[int], what: str) -> None:
    """Refuse sizes (X, Y, Z) that `strides` do not divide.

    Raises:
        UserError: names `what`, the axis and the nearest sizes that divide.
    """
    for axis, size, stride in zip(AXES, shape, strides, strict=True):
        if size % stride or size == 0:
            near = f"{max(size // stride, 1) * stride} or {(size // stride + 1) * stride}"
            raise UserError(f"{what} {list(shape)}: size {size} along {axis} does not divide by {stride}; use {near}")


def latent_sizes(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """(X', Y', Z') of the latent of a volume (X, Y, Z)."""
    return tuple(size // stride for size, stride in zip(shape, strides, strict=True))


def check_strides(shape: Sequence[int], autoencoder: Sequence[int], unet: Sequence[int]) -> None:
    """Refuse a volume (X, Y, Z) whose sizes the strides of the two networks, one after the other, do not divide."""
    strides = [a * b for a, b in zip(autoencoder, unet, strict=True)]
    check_divisible(shape, strides, "data.shape")


def check_volume_shape(shape: Sequence[int], autoencoder: "DictConfig", unet: "DictConfig") -> None:
    """Refuse a volume (X, Y, Z) that does not fit the two networks of these configs, before anything is read."""
    check_strides(shape, build_on_meta(autoencoder).strides, build_on_meta(unet).strides)


def build_on_meta(node: "DictConfig") -> nn.Module:
    """The network of a config on the meta device: its shapes without its memory."""
    from hydra.utils import instantiate

    with torch.device("meta"):
        return instantiate(node)
