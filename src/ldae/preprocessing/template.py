"""The template that scans are registered to: a brain without skull in a box of voxels; and resampling onto grids."""

from dataclasses import dataclass
from functools import lru_cache

import nibabel as nib
import numpy as np

from ldae.data.transforms import blur_before_downsampling
from ldae.preprocessing.volume import Volume
from ldae.utils.errors import UserError

EDGE = 0.15  # fraction of the brightest voxel that counts as brain; CSF is above it


@dataclass(frozen=True)
class Icbm152:
    """The ICBM 152 2009a symmetric template that nilearn ships.

    Attributes:
        name: BIDS label of its space.
    """

    name: str = "MNI152NLin2009aSym"

    def volume(self) -> Volume:
        """Load the brain at 1 mm, 0 outside."""
        from nilearn.datasets import load_mni152_template

        image = load_mni152_template(resolution=1)
        return Volume(image.get_fdata(dtype=np.float32), image.affine)


@dataclass(frozen=True)
class TemplateFile:
    """A template of the user's own.

    Attributes:
        path: a skull-stripped NIfTI file.
        name: BIDS label of its space, used in file names.
    """

    path: str
    name: str = "custom"

    def volume(self) -> Volume:
        """Load the brain, 0 outside."""
        if not self.name.isalnum():
            raise UserError(f"template.name={self.name}: a BIDS label has only letters and digits")
        return Volume.read(self.path)


Template = Icbm152 | TemplateFile


@lru_cache(maxsize=4)
def template_at_spacing(template: Template, spacing: float) -> Volume:
    """Resample the template to voxels of `spacing` mm."""
    return resample(template.volume(), spacing)


def template_brain(template: Volume) -> np.ndarray:
    """Mask of the brain in a template that is 0 outside it, (X, Y, Z) bool; resampling has blurred its edge."""
    return template.data > EDGE * template.data.max()


def resample(volume: Volume, spacing: float | None) -> Volume:
    """Resample linearly to cubic voxels of `spacing` mm along the same axes; None keeps the volume as it is.

    The field of view keeps its centre and grows by less than a voxel.
    """
    if spacing is None or np.allclose(volume.spacing, spacing, rtol=1e-4):
        return volume
    factor = spacing / volume.spacing
    shape = np.ceil(np.array(volume.data.shape) / factor - 1e-6).astype(int)
    linear = volume.affine[:3, :3] * factor
    centre = nib.affines.apply_affine(volume.affine, (np.array(volume.data.shape) - 1) / 2)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = linear, centre - linear @ ((shape - 1) / 2)
    return resample_onto(volume, Volume(np.zeros(shape, np.float32), affine))


def blur_for_spacing(volume: Volume, spacing: np.ndarray | float) -> Volume:
    """Blur a volume so that sampling it every `spacing` mm (a number, or one for each axis) causes no aliasing."""
    return volume.with_data(
        blur_before_downsampling(volume.data[None], np.broadcast_to(spacing, 3) / volume.spacing)[0]
    )


def resample_onto(volume: Volume, grid: Volume) -> Volume:
    """Resample linearly onto another grid in the same space, 0 outside the volume."""
    from scipy.ndimage import affine_transform

    matrix = np.linalg.inv(volume.affine) @ grid.affine
    blurred = blur_for_spacing(volume, grid.spacing.min())
    return grid.with_data(affine_transform(blurred.data, matrix, output_shape=grid.data.shape, order=1))
