"""The semantic encoder's own view of a scan: what it reads instead of the volume that the autoencoder compresses.

A view is made of the scan itself, at its own resolution, and then brought to a grid that may be finer than the
volumes'. The published view is the T1 volume (`T1View`); with the volumes' own grid it costs nothing. Volumes that
exist in model space alone, such as decoded ones, are brought to the view by `of_volumes`.

A view is chosen by the config group `data/view`, stored with every run of stage 3 and with every bundle, and is built
from there at inference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ldae.data.nifti import Source
from ldae.data.transforms import Transform
from ldae.utils.errors import UserError

Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class ViewedScan:
    """The view of one scan.

    Attributes:
        values: (channels, X, Y, Z) float32 in [0, 1].
        notes: remarks on what is unusual in the view.
    """

    values: np.ndarray
    notes: tuple[str, ...] = ()


class View(Protocol):
    """What the semantic encoder sees of a scan.

    Attributes:
        channels: number of maps.
        shape: voxels (X, Y, Z) of a map.
        spacing: voxel size in mm; None keeps that of the scan.
        has_intensities: whether the values are intensities, so that contrast and brightness can be augmented.
        assume_orientation: see Transform.
    """

    channels: int
    shape: tuple[int, int, int]
    spacing: Spacing | None
    has_intensities: bool
    assume_orientation: str | None

    def key(self) -> str:
        """A hash of all parameters. Views with the same key are comparable value by value."""
        ...

    def is_volume(self, transform: Transform) -> bool:
        """Whether the view of every scan is the volume that `transform` makes of it."""
        ...

    def assuming(self, orientation: str | None) -> "View":
        """The same view, for scans with this orientation if their files state none."""
        ...

    def __call__(self, source: Source) -> np.ndarray:
        """The view of a scan, (channels, X, Y, Z) float32 in [0, 1].

        Raises:
            BadScan: it cannot be used.
        """
        ...

    def read(self, source: Source) -> ViewedScan:
        """The same with remarks.

        Raises:
            BadScan: it cannot be used.
        """
        ...

    def of_volumes(self, x: Tensor) -> Tensor:
        """The views (B, channels, X, Y, Z) of volumes in model space, (B, 1, X', Y', Z') float32 in [0, 1]."""
        ...


class T1View:
    """The intensities of the scan, as published.

    Args:
        transform: brings scans to the volumes' model space.
        shape: voxels (X, Y, Z); None: the volumes'.
        spacing: voxel size in mm; None: the volumes'.
        channels: 1. Networks' configs refer to it, so it is part of the config.

    Raises:
        UserError: another number of channels, or an impossible grid.
    """

    has_intensities = True

    def __init__(
        self,
        transform: Transform,
        shape: Sequence[int] | None = None,
        spacing: float | Sequence[float] | None = None,
        channels: int = 1,
    ) -> None:
        refuse_other_channels(channels, 1)
        self.channels = 1
        self.volumes = transform
        self.transform = with_grid(transform, shape, spacing)
        self.shape, self.spacing = self.transform.shape, self.transform.spacing
        self.assume_orientation = self.transform.assume_orientation

    def key(self) -> str:
        """See View."""
        return self.transform.key()

    def is_volume(self, transform: Transform) -> bool:
        """See View."""
        return self.key() == transform.key()

    def assuming(self, orientation: str | None) -> "T1View":
        """See View."""
        if orientation == self.assume_orientation:
            return self
        return T1View(self.volumes.assuming(orientation), self.shape, self.spacing)

    def __call__(self, source: Source) -> np.ndarray:
        """See View."""
        return self.transform(source)

    def read(self, source: Source) -> ViewedScan:
        """See View."""
        return ViewedScan(self(source))

    def of_volumes(self, x: Tensor) -> Tensor:
        """See View. Volumes of another grid are interpolated."""
        return resample_centred(x, self.volumes.spacing, self.shape, self.spacing)


def is_default_view(node: Mapping[str, Any]) -> bool:
    """Whether a config of a view, as it is stored, is that of every model from before there were views."""
    return node.get("_target_") == f"{T1View.__module__}.{T1View.__qualname__}"


def refuse_other_channels(stated: int, channels: int) -> None:
    """Refuse a config whose number of channels is not that of the view.

    Raises:
        UserError: it is another.
    """
    if stated != channels:
        raise UserError(f"data.view.channels={stated}: this view has {channels}, which cannot be chosen")


def with_grid(transform: Transform, shape: Sequence[int] | None, spacing: float | Sequence[float] | None) -> Transform:
    """`transform` with another grid; None keeps its own.

    Raises:
        UserError: a voxel size is asked for, but the volumes keep that of each scan.
    """
    if spacing is not None and transform.spacing is None:
        raise UserError(f"data.view.spacing={spacing}: the volumes keep each scan's voxel size, so the view must, too")
    return Transform(
        transform.shape if shape is None else shape,
        transform.spacing if spacing is None else spacing,
        transform.intensity,
        transform.orientation,
        transform.assume_orientation,
    )


def resample_centred(x: Tensor, spacing: Spacing | None, shape: Sequence[int], new_spacing: Spacing | None) -> Tensor:
    """Maps (B, C, X, Y, Z) on another grid with the same centre, by linear interpolation; 0 outside of `x`.

    Args:
        spacing: voxel size of `x` in mm; None: that of the result.
        shape: voxels (X', Y', Z') of the result.
        new_spacing: voxel size of the result in mm.

    Returns:
        (B, C, X', Y', Z'); `x` itself if the grid is the same.
    """
    ratio = [1.0] * 3 if spacing is None or new_spacing is None else np.divide(new_spacing, spacing).tolist()
    if tuple(shape) == tuple(x.shape[2:]) and all(value == 1 for value in ratio):
        return x
    # grid_sample counts each axis of `x` from -1 to 1, the last axis first.
    axes = [
        (torch.arange(new, dtype=torch.float32, device=x.device) - (new - 1) / 2) * (2 * step / old)
        for new, step, old in zip(shape, ratio, x.shape[2:], strict=True)
    ]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], dim=-1)
    grid = grid.expand(len(x), *grid.shape)
    return functional.grid_sample(x.float(), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
