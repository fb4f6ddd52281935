"""Small scans without a file: ellipsoids with random bumps, in any orientation."""

import nibabel as nib
import numpy as np
import torch

from ldae.data.transforms import Transform
from ldae.scans.ood_check import OodCheck

SHAPE = (20, 24, 22)


def brain(seed: int = 0, size: float = 0.7, empty: float = 0.0) -> nib.Nifti1Image:
    """An ellipsoid with random bumps, in RAS at 4 mm, int16; `size` is its squared radius, `empty` the background."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij"))
    rng = np.random.default_rng(seed)
    bumps = sum(
        rng.uniform(100, 300) * np.exp(-((grid - rng.uniform(-0.4, 0.4, (3, 1, 1, 1))) ** 2).sum(0) / 0.1)
        for _ in range(6)
    )
    data = np.where((grid**2).sum(0) < size, 300 + bumps, empty)
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    affine[:3, 3] = (-31, 7, 12)
    return nib.Nifti1Image(data.astype(np.int16), affine)


def reoriented(image: nib.Nifti1Image, axcodes: str) -> nib.Nifti1Image:
    """The same image with its voxels stored in another orientation, such as LPI."""
    change = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine), nib.orientations.axcodes2ornt(axcodes)
    )
    return image.as_reoriented(change)


def fit_ood_check(transform: Transform) -> OodCheck:
    """The out-of-distribution check of eight such scans."""
    return OodCheck.fit(torch.from_numpy(transform(brain(seed))) for seed in range(8))
