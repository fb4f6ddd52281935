"""The space that scans are brought to: a brain without skull, and the box of voxels around it."""

from dataclasses import dataclass
from functools import lru_cache

import nibabel as nib
import numpy as np

from ldae.data.transforms import blur_before_downsampling
from ldae.preprocessing.volume import Volume
from ldae.utils.errors import UserError

EDGE = 0.15  # of the brightest voxel; CSF is above it


@dataclass(frozen=True)
class Icbm152:
    """ICBM 152 2009a symmetric, as nilearn ships it."""

    name: str = "MNI152NLin2009aSym"  # its BIDS label

    def volume(self) -> Volume:
        """The brain at 1 mm, 0 outside."""
        from nilearn.datasets import load_mni152_template

        image = load_mni152_template(resolution=1)
        return Volume(image.get_fdata(dtype=np.float32), image.affine)


@dataclass(frozen=True)
class TemplateFile:
    """Another one: a skull-stripped NIfTI, and the label that file names shall carry."""

    path: str
    name: str = "custom"

    def volume(self) -> Volume:
        """The brain, 0 outside."""
        if not self.name.isalnum():
            raise UserError(f"template.name={self.name}: letters and digits alone make a BIDS label")
        return Volume.read(self.path)


Template = Icbm152 | TemplateFile


@lru_cache(maxsize=4)
def template_at_spacing(template: Template, spacing: float) -> Volume:
    """The template on voxels of `spacing` mm, its box kept and centred."""
    return resample(template.volume(), spacing)


def template_brain(template: Volume) -> np.ndarray:
    """The brain of a template that is 0 outside it, (X, Y, Z) bool; resampling has blurred its edge."""
    return template.data > EDGE * template.data.max()


def resample(volume: Volume, spacing: float | None) -> Volume:
    """`volume` on cubes of `spacing` mm in the same axes, linearly; the box grows by less than a voxel."""
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
    """What a grid of `spacing` mm can hold of `volume`: no aliases when it is sampled there."""
    return volume.with_data(
        blur_before_downsampling(volume.data[None], np.broadcast_to(spacing, 3) / volume.spacing)[0]
    )


def resample_onto(volume: Volume, grid: Volume) -> Volume:
    """`volume` sampled linearly on `grid`, both in the same world; 0 outside."""
    from scipy.ndimage import affine_transform

    matrix = np.linalg.inv(volume.affine) @ grid.affine
    data = affine_transform(
        blur_for_spacing(volume, grid.spacing.min()).data, matrix, output_shape=grid.data.shape, order=1
    )
    return grid.with_data(data)
