"""From a scan's own space to the template's, by ANTs: rigid, affine, or deformable (SyN).

Affine is the default: a deformable registration removes the atrophy that is to be learned, a rigid one leaves the size
of the head in.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldae.data.nifti import BadScan
from ldae.preprocessing.template import blur_for_spacing
from ldae.preprocessing.volume import TO_LPS, Volume


@dataclass(frozen=True)
class Transforms:
    """Files in ANTs' order (the last is applied first), and which of them are inverted on the way."""

    forward: tuple[Path, ...]
    inverse: tuple[Path, ...]
    inverted: tuple[bool, ...]  # of `inverse`

    @classmethod
    def from_record(cls, out: Path, files: Mapping[str, str]) -> "Transforms":
        """Those of a finished scan: `files` is what its record (OUT/records/*.json) lists, relative to `out`."""
        forward, inverse = (
            tuple(out / files[name] for name in sorted(files) if name.startswith(way)) for way in ("forward", "inverse")
        )
        return cls(forward, inverse, tuple(path.suffix == ".mat" for path in inverse))

    def to_template(self, scan: Volume, grid: Volume, interpolator: str) -> Volume:
        """`scan`, blurred to what `grid` can hold, on the template's `grid`."""
        return _apply(blur_for_spacing(scan, grid.spacing.min()), grid, self.forward, None, interpolator)

    def labels_to_template(self, labels: Volume, grid: Volume) -> Volume:
        """A label map on the template's `grid`: in each voxel the label with the largest linear weight, 0 outside."""
        axes = np.meshgrid(*(np.arange(1, n + 1, dtype=np.float32) for n in labels.data.shape), indexing="ij")
        places = [_apply(labels.with_data(axis), grid, self.forward, None, "linear").data for axis in axes]
        return grid.with_data(_vote(labels.data, np.stack(places) - 1))

    def to_native(self, volume: Volume, grid: Volume, interpolator: str) -> Volume:
        """A volume in the template's space, blurred to what `grid` can hold, on the scan's own `grid`."""
        return _apply(blur_for_spacing(volume, grid.spacing.min()), grid, self.inverse, self.inverted, interpolator)


def _apply(volume: Volume, grid: Volume, files: tuple[Path, ...], inverted: Any, interpolator: str) -> Volume:
    import ants

    image = ants.apply_transforms(
        grid.to_ants(), volume.to_ants(), [str(path) for path in files], interpolator=interpolator,
        whichtoinvert=None if inverted is None else list(inverted),
    )  # fmt: skip
    return grid.with_data(image.numpy())


def _vote(labels: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Labels (X, Y, Z) read at `places` (3, ...) in voxels, -1 where outside.

    ANTs' genericLabel does the same a label at a time: half of a scan's minute where an atlas has 150.
    """
    found = np.zeros(places.shape[1:], labels.dtype)
    inside = (places > -1 + 1e-3).all(axis=0)
    places = places[:, inside].clip(0, np.array(labels.shape)[:, None] - 1)
    low = np.minimum(places.astype(int), np.maximum(np.array(labels.shape)[:, None] - 2, 0))
    share = places - low
    corners, weights = [], []
    for corner in np.ndindex(2, 2, 2):
        step = np.array(corner)[:, None]
        corners.append(labels[tuple(np.minimum(low + step, np.array(labels.shape)[:, None] - 1))])
        weights.append(np.where(step, share, 1 - share).prod(axis=0))
    corners, weights = np.stack(corners), np.stack(weights)
    winners = corners[0].copy()
    mixed = (corners != corners[0]).any(axis=0)  # few: elsewhere all agree
    corners, weights = corners[:, mixed], weights[:, mixed]
    totals = np.stack([(weights * (corners == own)).sum(axis=0) for own in corners])
    winners[mixed] = np.take_along_axis(corners, totals.argmax(axis=0)[None], axis=0)[0]
    found[inside] = winners
    return found


@dataclass(frozen=True)
class Registration:
    """ANTs' registration of brains.

    transform: ANTs' name, "Rigid", "Affine" or "SyN"; spacing: mm at which it is estimated; shrink, smoothing and
    iterations: levels, coarse to fine, of the linear part; seed: of the sampled voxels.
    """

    transform: str = "Affine"
    spacing: float = 2.0
    shrink: tuple[int, ...] = (4, 2)
    smoothing: tuple[int, ...] = (2, 1)
    iterations: tuple[int, ...] = (1000, 500)
    seed: int = 1

    def __call__(self, brain: Volume, template: Volume, folder: Path) -> Transforms:
        """Register `brain` (0 outside) to `template`; the transforms' files go to `folder`.

        Raises:
            BadScan: ANTs finds none.
        """
        import ants

        try:
            found = ants.registration(
                template.to_ants(), brain.to_ants(), self.transform, outprefix=f"{folder}/", random_seed=self.seed,
                # A list instead of a tuple is not understood.
                aff_shrink_factors=tuple(self.shrink), aff_smoothing_sigmas=tuple(self.smoothing),
                aff_iterations=tuple(self.iterations),
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise BadScan(f"it could not be registered ({str(error).strip().splitlines()[-1][:200]})") from error
        forward = tuple(Path(path) for path in found["fwdtransforms"])
        inverse = tuple(Path(path) for path in found["invtransforms"])
        return Transforms(forward, inverse, tuple(path.suffix == ".mat" for path in inverse))


def read_affine(path: Path) -> np.ndarray:
    """The affine in one of ANTs' files as template mm to scan mm, RAS, 4x4: how ANTs pulls a scan to the template."""
    import ants

    transform = ants.read_transform(str(path))
    origin, *axes = (
        np.array(transform.apply_to_point(point)) for point in np.concatenate([np.zeros((1, 3)), np.eye(3)])
    )
    pull = np.eye(4)
    pull[:3, :3], pull[:3, 3] = np.stack([axis - origin for axis in axes], 1), origin
    return TO_LPS @ pull @ TO_LPS
