"""Random augmentation of volumes: left-right flip, small affine maps, intensity shift, contrast. Off by default."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ldae.utils.seeding import make_generator

# Names of the random draws in a batch.
FLIP, THETA, GAMMA, SHIFT = "augment_flip", "augment_theta", "augment_gamma", "augment_shift"


@dataclass(frozen=True)
class Augmentation:
    """Random changes of volumes in model space. Those of a sample depend neither on its batch nor on its process.

    The numbers are drawn on the CPU when a sample is fetched, and applied to a whole batch on the device.

    Args:
        flip: probability of a left-right flip.
        rotation: largest angle about each axis, in degrees.
        scaling: largest relative change of size along each axis.
        translation: largest translation along each axis, in voxels.
        shift: largest absolute intensity that is added; intensities are in [0, 1].
        contrast: intensities are raised to a power between 1 / (1 + contrast) and 1 + contrast, log-uniform.
    """

    flip: float = 0.0
    rotation: float = 0.0
    scaling: float = 0.0
    translation: float = 0.0
    shift: float = 0.0
    contrast: float = 0.0

    @property
    def is_off(self) -> bool:
        """Whether no volume is ever changed."""
        return not any(astuple(self))

    def draw(self, seed: int, keys: Sequence[int], shape: Sequence[int]) -> dict[str, Tensor]:
        """Draw the changes of B samples. Those of sample i depend on (seed, keys[i]) alone.

        All numbers are always drawn, so that switching one change off leaves the others as they are.

        Args:
            shape: voxels (X, Y, Z) of a volume.

        Returns:
            Those of the following that are switched on, on the CPU: "augment_flip" (B,) bool; "augment_theta"
            (B, 3, 4) float32, matrices as `torch.nn.functional.affine_grid` takes them with align_corners=False;
            "augment_gamma" and "augment_shift", (B,) float32.
        """
        generators = [make_generator(seed, "augmentation", int(key)) for key in keys]
        drawn = torch.stack([torch.rand(12, generator=source, dtype=torch.float64) for source in generators])
        even = 2 * drawn - 1
        changes = {}
        if self.flip:
            changes[FLIP] = drawn[:, 0] < self.flip
        if self.rotation or self.scaling or self.translation:
            changes[THETA] = self._theta(even[:, 1:4], even[:, 4:7], even[:, 7:10], shape).float()
        if self.contrast:
            changes[GAMMA] = torch.exp(even[:, 10] * math.log1p(self.contrast)).float()
        if self.shift:
            changes[SHIFT] = (self.shift * even[:, 11]).float()
        return changes

    @staticmethod
    def apply(x: Tensor, drawn: Mapping[str, Any]) -> Tensor:
        """Apply the changes that `draw` gave, without reading a value back from the device.

        Args:
            x: (B, 1, X, Y, Z) float32 in [0, 1].
            drawn: a batch with these changes on the device of `x`; other entries are ignored.

        Returns:
            A tensor like `x`; `x` itself if no change was drawn.
        """
        if FLIP in drawn:
            x = torch.where(_by_sample(drawn[FLIP]), x.flip(2), x)
        if THETA in drawn:
            grid = _grid(drawn[THETA], x.shape[2:])
            x = functional.grid_sample(x, grid, mode="bilinear", align_corners=False)  # 0 from outside
        if GAMMA in drawn:
            x = x.clamp(0, 1) ** _by_sample(drawn[GAMMA])
        if SHIFT in drawn:
            x = (x + _by_sample(drawn[SHIFT])).clamp(0, 1)
        return x

    def _theta(self, angles: Tensor, sizes: Tensor, moves: Tensor, shape: Sequence[int]) -> Tensor:
        """Matrices (B, 3, 4) that rotate, scale and translate about the centre; each argument is (B, 3) in [-1, 1]."""
        matrix = _rotation(angles * math.radians(self.rotation)) @ torch.diag_embed(1 + self.scaling * sizes)
        # The rotation is one in voxels, but torch's grid counts every axis from -1 to 1, the last axis first.
        half = torch.tensor(tuple(shape), dtype=angles.dtype) / 2
        matrix = matrix * half / half[:, None]
        move = self.translation * moves / half
        return torch.cat([matrix.flip(1, 2), move.flip(1)[:, :, None]], dim=2)


def _by_sample(value: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1, 1)."""
    return value.view(-1, 1, 1, 1, 1)


def _grid(theta: Tensor, shape: Sequence[int]) -> Tensor:
    """The grid that `affine_grid` gives, (B, X, Y, Z, 3), without its matrix product.

    Autocast or TF32 would round the product to bfloat16 or TF32, and coordinates by a noticeable fraction of a voxel.
    """
    x, y, z = ((2 * torch.arange(n, device=theta.device) + 1) / n - 1 for n in shape)
    of_z, of_y, of_x, move = theta[:, None, None, None].unbind(-1)  # (B, 1, 1, 1, 3) each
    return of_x * x[:, None, None, None] + (of_y * y[:, None, None] + (of_z * z[:, None] + move))


def _rotation(angles: Tensor) -> Tensor:
    """Rotation matrices (B, 3, 3) from angles (B, 3) in radians about x, y and z, applied in this order."""
    result = torch.eye(3, dtype=angles.dtype)
    for axis, angle in enumerate(angles.unbind(1)):
        first, second = [i for i in range(3) if i != axis]
        turn = torch.eye(3, dtype=angles.dtype).repeat(len(angles), 1, 1)
        turn[:, first, first] = turn[:, second, second] = torch.cos(angle)
        turn[:, first, second], turn[:, second, first] = -torch.sin(angle), torch.sin(angle)
        result = turn @ result
    return result
