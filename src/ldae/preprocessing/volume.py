"""A volume with its affine: read, written, and handed to ANTs and back.

Scans stay on their own grid and in their own axes until they are registered. Affines are nibabel's (voxel to mm, RAS);
ANTs' world is LPS, its grids are origin, spacing and an orthonormal direction.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from ldae.data.nifti import BadScan, load_scan
from ldae.data.transforms import Source
from ldae.utils.files import replacing

TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
MAX_SHEAR = 1e-2  # of a direction's entries: beyond it, no box describes the grid


@dataclass(frozen=True)
class Volume:
    """data: (X, Y, Z) float32; affine: voxel to mm, RAS, 4x4."""

    data: np.ndarray
    affine: np.ndarray

    @classmethod
    def read(cls, source: Source, constant: bool = False) -> "Volume":
        """The volume in a NIfTI or an image. `constant` allows equal voxels, as in a mask. Raises BadScan."""
        return cls(*load_scan(source, reject_constant=not constant))

    def write(self, path: Path | str, dtype: Any = np.float32) -> None:
        """As NIfTI of `dtype`, atomically."""
        image = nib.Nifti1Image(self.data.astype(dtype), self.affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(self.affine, code=2)  # aligned
        image.set_qform(self.affine, code=2)
        with replacing(path) as temporary:
            nib.save(image, temporary)

    def with_data(self, data: np.ndarray) -> "Volume":
        """Other voxels on the same grid."""
        return Volume(np.asarray(data, dtype=np.float32), self.affine)

    @cached_property
    def spacing(self) -> np.ndarray:
        """Voxel size in mm along the volume's own axes, (3,)."""
        return nib.affines.voxel_sizes(self.affine)

    @property
    def voxel_mm3(self) -> float:
        """Volume of one voxel."""
        return float(np.prod(self.spacing))

    def to_ants(self) -> Any:
        """The same as an ANTsImage. Raises BadScan for a sheared grid, which ITK cannot hold."""
        import ants

        affine = TO_LPS @ self.affine
        cosines = affine[:3, :3] / self.spacing
        u, _, v = np.linalg.svd(cosines)
        if np.abs(u @ v - cosines).max() > MAX_SHEAR:
            raise BadScan("its affine shears the voxels: resample it to a rectangular grid")
        return ants.from_numpy(
            np.ascontiguousarray(self.data, dtype=np.float32),
            origin=affine[:3, 3].tolist(),
            spacing=self.spacing.tolist(),
            direction=u @ v,
        )

    @classmethod
    def from_ants(cls, image: Any) -> "Volume":
        """The inverse of `to_ants`."""
        affine = np.eye(4)
        affine[:3, :3] = np.asarray(image.direction) * np.asarray(image.spacing)
        affine[:3, 3] = image.origin
        return cls(image.numpy().astype(np.float32), TO_LPS @ affine)
