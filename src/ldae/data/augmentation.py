"""Augmentation of the published kind: left-right flip, small affine, intensity shift, contrast. Off by default."""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ldae.noise import generator


@dataclass(frozen=True)
class Augmentation:
    """Random changes of volumes in model space, drawn by sample: neither batch nor process changes them.

    Args:
        flip: probability of a left-right flip.
        rotation: largest angle about each axis, degrees.
        scaling: largest relative change of size along each axis.
        translation: largest move along each axis, voxels.
        shift: largest intensity added.
        contrast: gamma between 1 / (1 + contrast) and 1 + contrast, uniform in its logarithm.
    """

    flip: float = 0.0
    rotation: float = 0.0
    scaling: float = 0.0
    translation: float = 0.0
    shift: float = 0.0
    contrast: float = 0.0

    def __call__(self, x: Tensor, seed: int, keys: Sequence[int]) -> Tensor:
        """Augment (B, 1, X, Y, Z) in [0, 1]; sample i depends on (seed, keys[i]) and itself alone.

        Returns `x` itself where everything is off.
        """
        if not any(astuple(self)):
            return x
        return torch.stack([self._one(volume, seed, int(key)) for volume, key in zip(x, keys, strict=True)])

    def _one(self, volume: Tensor, seed: int, key: int) -> Tensor:
        """Augment (1, X, Y, Z). All numbers are drawn always: one change switched off leaves the others."""
        drawn = torch.rand(12, generator=generator(seed, "augmentation", key), dtype=torch.float64)
        even = 2 * drawn - 1
        if drawn[0] < self.flip:
            volume = volume.flip(1)
        if self.rotation or self.scaling or self.translation:
            volume = self._move(volume, even[1:4], even[4:7], even[7:10])
        if self.contrast:
            volume = volume.clamp(0, 1) ** math.exp(float(even[10]) * math.log1p(self.contrast))
        if self.shift:
            volume = (volume + self.shift * float(even[11])).clamp(0, 1)
        return volume

    def _move(self, volume: Tensor, angles: Tensor, sizes: Tensor, moves: Tensor) -> Tensor:
        """Resample (1, X, Y, Z) under rotation, scaling and translation about its centre; 0 flows in."""
        matrix = _rotation(angles * math.radians(self.rotation)) @ torch.diag(1 + self.scaling * sizes)
        # In torch's grid, axes run backwards and every axis from -1 to 1: the rotation is one of voxels.
        half = torch.tensor(volume.shape[1:], dtype=torch.float64) / 2
        matrix = matrix * half / half[:, None]
        move = self.translation * moves / half
        theta = torch.cat([matrix.flip(0, 1), move.flip(0)[:, None]], dim=1).to(volume)
        grid = functional.affine_grid(theta[None], [1, *volume.shape], align_corners=False)
        return functional.grid_sample(volume[None], grid, mode="bilinear", align_corners=False)[0]


def _rotation(angles: Tensor) -> Tensor:
    """Rotation matrix from three angles about x, y, z, in this order, radians."""
    result = torch.eye(3, dtype=angles.dtype)
    for axis, angle in enumerate(angles):
        first, second = [i for i in range(3) if i != axis]
        turn = torch.eye(3, dtype=angles.dtype)
        turn[first, first] = turn[second, second] = torch.cos(angle)
        turn[first, second], turn[second, first] = -torch.sin(angle), torch.sin(angle)
        result = turn @ result
    return result
