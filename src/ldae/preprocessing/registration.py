"""Registration of scans to the template with ANTs: rigid, affine, or deformable (SyN).

The default is affine: a deformable registration would remove the atrophy that the model is to learn, and a rigid one
leaves differences in head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ldae.data.nifti import BadScan
from ldae.preprocessing.template import blur_for_spacing
from ldae.preprocessing.volume import RAS_TO_LPS, Volume


@dataclass(frozen=True)
class Transforms:
    """Files of the transforms between a scan's own space and the template's.

    Attributes:
        forward: scan to template, in ANTs' order (the last one is applied first).
        inverse: template to scan, likewise.
        inverted: for each file of `inverse`, whether ANTs has to invert it.
    """

    forward: tuple[Path, ...]
    inverse: tuple[Path, ...]
    inverted: tuple[bool, ...]

    @classmethod
    def from_record(cls, out: Path, files: Mapping[str, str]) -> "Transforms":
        """The transforms of a finished scan.

        Args:
            out: output folder of `ldae preprocess`.
            files: the entry `files` of the scan's record (OUT/records/*.json), relative to `out`.
        """
        forward, inverse = (
            tuple(out / files[name] for name in sorted(files) if name.startswith(way)) for way in ("forward", "inverse")
        )
        return cls(forward, inverse, tuple(path.suffix == ".mat" for path in inverse))

    def affine_determinant(self) -> float:
        """Volume of a piece of the scan over that of the same piece in template space, by the affine alone.

        It is the part of a head's size that registration takes out of the image.
        """
        (affine,) = (read_affine(path) for path in self.forward if path.suffix == ".mat")
        return float(np.linalg.det(affine[:3, :3]))

    def to_template(self, scan: Volume, grid: Volume, interpolator: str) -> Volume:
        """Resample a volume in the scan's space onto `grid` in the template's space, blurred against aliasing."""
        return _apply(blur_for_spacing(scan, grid.spacing.min()), grid, self.forward, None, interpolator)

    def labels_to_template(self, labels: Volume, grid: Volume) -> Volume:
        """Resample a label map onto `grid` in the template's space.

        Each voxel gets the label with the largest weight in linear interpolation, 0 outside the map.
        """
        axes = np.meshgrid(*(np.arange(1, n + 1, dtype=np.float32) for n in labels.data.shape), indexing="ij")
        # The voxel coordinates themselves are resampled. They count from 1, because ANTs returns 0 outside.
        points = [_apply(labels.with_data(axis), grid, self.forward, None, "linear").data for axis in axes]
        return grid.with_data(_interpolate_labels(labels.data, np.stack(points) - 1))

    def to_native(self, volume: Volume, grid: Volume, interpolator: str) -> Volume:
        """Resample a volume in the template's space onto `grid` in the scan's space, blurred against aliasing."""
        return _apply(blur_for_spacing(volume, grid.spacing.min()), grid, self.inverse, self.inverted, interpolator)


def _apply(
    volume: Volume, grid: Volume, files: Sequence[Path], inverted: Sequence[bool] | None, interpolator: str
) -> Volume:
    import ants

    image = ants.apply_transforms(
        grid.to_ants(), volume.to_ants(), [str(path) for path in files], interpolator=interpolator,
        whichtoinvert=None if inverted is None else list(inverted),
    )  # fmt: skip
    return grid.with_data(image.numpy())


def _interpolate_labels(labels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Read labels (X, Y, Z) at `points` (3, ...) in voxels, -1 outside: the label with the largest linear weight.

    ANTs' genericLabel gives the same but resamples one label at a time, which doubles the time for an atlas of 150.
    """
    found = np.zeros(points.shape[1:], labels.dtype)
    inside = (points > -1 + 1e-3).all(axis=0)
    points = points[:, inside].clip(0, np.array(labels.shape)[:, None] - 1)
    low = np.minimum(points.astype(int), np.maximum(np.array(labels.shape)[:, None] - 2, 0))
    share = points - low
    corners, weights = [], []
    for corner in np.ndindex(2, 2, 2):
        step = np.array(corner)[:, None]
        corners.append(labels[tuple(np.minimum(low + step, np.array(labels.shape)[:, None] - 1))])
        weights.append(np.where(step, share, 1 - share).prod(axis=0))
    corners, weights = np.stack(corners), np.stack(weights)
    winners = corners[0].copy()
    mixed = (corners != corners[0]).any(axis=0)  # few points: elsewhere all corners have the same label
    corners, weights = corners[:, mixed], weights[:, mixed]
    totals = np.stack([(weights * (corners == own)).sum(axis=0) for own in corners])
    winners[mixed] = np.take_along_axis(corners, totals.argmax(axis=0)[None], axis=0)[0]
    found[inside] = winners
    return found


@dataclass(frozen=True)
class Registration:
    """Registration of brains with ANTs.

    Attributes:
        transform: ANTs' name, "Rigid", "Affine" or "SyN".
        spacing: voxel size of the template in mm at which the transform is estimated.
        shrink, smoothing, iterations: one value for each level of the linear part, coarse to fine.
        seed: of the random sample of voxels that the similarity is computed on.
    """

    transform: str = "Affine"
    spacing: float = 2.0
    shrink: tuple[int, ...] = (4, 2)
    smoothing: tuple[int, ...] = (2, 1)
    iterations: tuple[int, ...] = (1000, 500)
    seed: int = 1

    def __call__(self, brain: Volume, template: Volume, folder: Path) -> Transforms:
        """Register a brain to the template.

        Args:
            brain, template: 0 outside the brain.
            folder: receives the files of the transforms.

        Raises:
            BadScan: ANTs fails.
        """
        import ants

        try:
            found = ants.registration(
                template.to_ants(), brain.to_ants(), self.transform, outprefix=f"{folder}/", random_seed=self.seed,
                # ants.registration accepts tuples only, not lists.
                aff_shrink_factors=tuple(self.shrink), aff_smoothing_sigmas=tuple(self.smoothing),
                aff_iterations=tuple(self.iterations),
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise BadScan(f"it could not be registered ({str(error).strip().splitlines()[-1][:200]})") from error
        forward = tuple(Path(path) for path in found["fwdtransforms"])
        inverse = tuple(Path(path) for path in found["invtransforms"])
        return Transforms(forward, inverse, tuple(path.suffix == ".mat" for path in inverse))


def read_affine(path: Path) -> np.ndarray:
    """Read an affine from one of ANTs' files: template mm to scan mm, RAS, 4x4 (ANTs resamples by this direction)."""
    import ants

    transform = ants.read_transform(str(path))
    origin, *axes = (
        np.array(transform.apply_to_point(point)) for point in np.concatenate([np.zeros((1, 3)), np.eye(3)])
    )
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = np.stack([axis - origin for axis in axes], 1), origin
    return RAS_TO_LPS @ affine @ RAS_TO_LPS
