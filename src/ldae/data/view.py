"""The semantic encoder's own view of a scan: what it reads instead of the volume that the autoencoder compresses.

A view is made of the scan itself, at its own resolution, and then brought to a grid that may be finer than the
volumes'. The published view is the T1 volume (`T1View`); with the volumes' own grid it costs nothing. Volumes that
exist in model space alone, such as decoded ones, are brought to the view by `of_volumes`.

A view is chosen by the config group `data/view`, stored with every run of stage 3 and with every bundle, and is built
from there at inference.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from ldae.data.nifti import BadScan, Source, load_scan
from ldae.data.tissues import Mixture, TissueMaker, TissuesNotFound
from ldae.data.transforms import Transform
from ldae.data.view_grid import Spacing, resample_centred, with_grid
from ldae.utils.errors import UserError

VERSION = 1  # to be raised when the same parameters give other values, so that caches are not reused
BACKGROUND = 0.05  # intensity in [0, 1] up to which a decoded volume is background, unless it is enclosed by the brain
DARKEST = 1e-3  # intensity of the darkest voxel of a brain in such a volume, because 0 is the background


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


class GridView:
    """What views have in common: the grid that they bring scans to.

    Args:
        transform: brings scans to the volumes' model space.
        shape: voxels (X, Y, Z); None: the volumes'.
        spacing: voxel size in mm; None: the volumes'.

    Raises:
        UserError: an impossible grid.
    """

    def __init__(
        self, transform: Transform, shape: Sequence[int] | None, spacing: float | Sequence[float] | None
    ) -> None:
        self.volumes = transform
        self.transform = with_grid(transform, shape, spacing)
        self.shape, self.spacing = self.transform.shape, self.transform.spacing
        self.assume_orientation = self.transform.assume_orientation

    def assuming(self, orientation: str | None) -> Self:
        """See View."""
        if orientation == self.assume_orientation:
            return self
        view = copy(self)
        GridView.__init__(view, self.volumes.assuming(orientation), self.shape, self.spacing)
        return view


class T1View(GridView):
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
        super().__init__(transform, shape, spacing)
        refuse_other_channels(channels, 1)
        self.channels = 1

    def key(self) -> str:
        """See View."""
        return self.transform.key()

    def is_volume(self, transform: Transform) -> bool:
        """See View."""
        return self.key() == transform.key()

    def __call__(self, source: Source) -> np.ndarray:
        """See View."""
        return self.transform(source)

    def read(self, source: Source) -> ViewedScan:
        """See View."""
        return ViewedScan(self(source))

    def of_volumes(self, x: Tensor) -> Tensor:
        """See View. Volumes of another grid are interpolated."""
        return resample_centred(x, self.volumes.spacing, self.shape, self.spacing)


class TissueView(GridView):
    """Maps of CSF, grey and white matter, made at the resolution of the scan and then brought to the grid.

    On 149 real scans they tell age and sex better than the intensities do (docs/method.md): they hold anatomy without
    contrast and brightness.

    Args:
        transform: brings scans to the volumes' model space.
        shape, spacing: as for T1View.
        maker: makes the maps; by default `Mixture`, as in conf/data/view.
        channels: number of maps of the maker. Networks' configs refer to it, so it is part of the config.
        scan_spacing: voxel size of the scans in mm, for `of_volumes`: in volumes of larger voxels than the scans', the
            boundaries of tissues are less sharp. None: that of the volumes. It does not change the views of scans.

    Raises:
        UserError: another number of channels, or an impossible grid.
    """

    has_intensities = False

    def __init__(
        self,
        transform: Transform,
        shape: Sequence[int] | None = None,
        spacing: float | Sequence[float] | None = None,
        maker: TissueMaker | None = None,
        channels: int = 3,
        scan_spacing: float | None = None,
    ) -> None:
        super().__init__(transform, shape, spacing)
        self.maker = maker or Mixture()
        refuse_other_channels(channels, self.maker.channels)
        self.channels, self.scan_spacing = channels, scan_spacing

    def key(self) -> str:
        """See View."""
        grid = [self.transform.orientation, self.spacing, self.shape]
        parameters = [VERSION, "tissues", grid, self.maker.parameters()]
        return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]

    def is_volume(self, transform: Transform) -> bool:
        """See View."""
        return False

    def __call__(self, source: Source) -> np.ndarray:
        """See View."""
        return self.read(source).values

    def read(self, source: Source) -> ViewedScan:
        """See View."""
        scan = load_scan(source, self.assume_orientation)
        path = source if isinstance(source, str | Path) else None
        try:
            tissues = self.maker(scan.data)
            return ViewedScan(self.transform.maps(tissues.values, scan.affine), tissues.notes)
        except TissuesNotFound as error:
            raise BadScan(str(error), path) from error
        except BadScan as error:
            raise BadScan(error.reason, path) from None

    def of_volumes(self, x: Tensor) -> Tensor:
        """See View. The tissues are found at the resolution of the volumes; the maps are 0 where there are none."""
        ratio = 1.0
        if self.scan_spacing is not None and self.volumes.spacing is not None:
            ratio = max(1.0, min(self.volumes.spacing) / self.scan_spacing)
        maker = self.maker.for_larger_voxels(ratio)
        maps = [_map_volume(volume, maker) for volume in x[:, 0].detach().float().cpu().numpy()]
        views = resample_centred(torch.from_numpy(np.stack(maps)), self.volumes.spacing, self.shape, self.spacing)
        return views.to(x.device)


def _map_volume(volume: np.ndarray, maker: TissueMaker) -> np.ndarray:
    """Maps (channels, X, Y, Z) of a volume (X, Y, Z), whose background need not be exactly 0."""
    from scipy.ndimage import binary_fill_holes

    brain = binary_fill_holes(volume > BACKGROUND)  # CSF in the ventricles can be as dark as the background
    try:
        return maker(np.where(brain, np.maximum(volume, DARKEST), 0).astype(np.float32)).values
    except TissuesNotFound:
        return np.zeros((maker.channels, *volume.shape), np.float32)


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
