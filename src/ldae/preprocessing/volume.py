"""A volume with its affine: reading, writing, and conversion to and from ANTs images.

Scans keep their own grid and axes until they are registered. Affines are nibabel's (voxel to mm, RAS). ANTs uses LPS,
and describes a grid by origin, spacing and orthonormal direction cosines.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from numpy.typing import DTypeLike

from ldae.data.nifti import BadScan, Source, load_label_map, load_scan
from ldae.utils.files import replacing

if TYPE_CHECKING:
    from ants import ANTsImage

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # its own inverse
MAX_SHEAR = 1e-2  # largest deviation of the direction cosines from an orthonormal matrix


@dataclass(frozen=True)
class Volume:
    """A volume on a grid.

    Attributes:
        data: (X, Y, Z) float32.
        affine: voxel to mm, RAS, 4x4.
    """

    data: np.ndarray
    affine: np.ndarray

    @classmethod
    def read(cls, source: Source) -> "Volume":
        """Read a scan; its background becomes 0.

        Raises:
            BadScan: see ldae.data.nifti.load_scan.
        """
        scan = load_scan(source)
        return cls(scan.data, scan.affine)

    @classmethod
    def read_labels(cls, source: Source, orientation: str | None = None) -> "Volume":
        """Read a label map or a mask, which may be empty; `orientation` is assumed if the file states none.

        Raises:
            BadScan: see ldae.data.nifti.load_label_map.
        """
        labels = load_label_map(source, orientation)
        return cls(labels.data, labels.affine)

    def write(self, path: Path | str, dtype: DTypeLike = np.float32) -> None:
        """Write a NIfTI file of `dtype`, atomically."""
        image = nib.Nifti1Image(self.data.astype(dtype), self.affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(self.affine, code=2)  # 2: aligned
        image.set_qform(self.affine, code=2)
        with replacing(path) as temporary:
            nib.save(image, temporary)

    def with_data(self, data: np.ndarray) -> "Volume":
        """A volume of other voxels on the same grid."""
        return Volume(np.asarray(data, dtype=np.float32), self.affine)

    @cached_property
    def spacing(self) -> np.ndarray:
        """Voxel size in mm along the volume's own axes, (3,)."""
        return nib.affines.voxel_sizes(self.affine)

    @property
    def voxel_mm3(self) -> float:
        """Volume of one voxel in mm3."""
        return float(np.prod(self.spacing))

    def to_ants(self) -> "ANTsImage":
        """Convert to an ANTsImage.

        Raises:
            BadScan: the grid is sheared, which ITK cannot represent.
        """
        import ants

        affine = RAS_TO_LPS @ self.affine
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
