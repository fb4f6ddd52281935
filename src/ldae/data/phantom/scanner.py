"""What a scanner makes of a subject's anatomy: tissue contrast, bias field and noise.

Everything random depends on (seed, subject, session) only, not on the anatomy, so that a counterfactual has the same
contrast, bias field and noise as the scan itself.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldae.data.phantom.subjects import Factors
from ldae.data.phantom.template_maps import CSF_LEVEL, GREY_LEVEL, WHITE_LEVEL


@dataclass(frozen=True)
class Scanner:
    """A kind of scanner.

    The intensity of grey matter varies most between scans. This changes the mean intensity of a scan more than atrophy
    does, so that the mean alone hardly predicts the diagnosis.

    Attributes:
        grey, csf: mean intensities relative to white matter.
        grey_jitter, csf_jitter: their standard deviations between scans.
        bias: amplitude of the bias field.
        noise: standard deviation of the noise relative to white matter.
        level: mean intensity of white matter, in arbitrary units.
    """

    grey: float
    csf: float
    grey_jitter: float
    csf_jitter: float
    bias: float
    noise: float
    level: float


SCANNERS = {
    "A": Scanner(grey=0.75, csf=0.28, grey_jitter=0.11, csf_jitter=0.04, bias=0.08, noise=0.02, level=700),
    "B": Scanner(grey=0.70, csf=0.22, grey_jitter=0.11, csf_jitter=0.04, bias=0.11, noise=0.03, level=1100),
}


def voxel_centres(spacing: float, shape: tuple[int, ...]) -> list[Tensor]:
    """Centres of the voxels along each axis, in mm from the middle of the field of view."""
    return [(torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * spacing for n in shape]


def _draw_bias_field(rng: np.random.Generator, amplitude: float, spacing: float, shape: tuple[int, ...]) -> Tensor:
    """A smooth multiplicative field around 1, (X, Y, Z): the exponential of a polynomial of degree 2 in each axis."""
    coefficients = rng.standard_normal((3, 3, 3)) * amplitude / 2
    coefficients[0, 0, 0] = 0
    powers = [
        torch.stack([axis**0, axis / 80, (axis / 80) ** 2 - 0.3], dim=1) for axis in voxel_centres(spacing, shape)
    ]
    return torch.einsum("ijk,xi,yj,zk->xyz", torch.from_numpy(coefficients).float(), *powers).clamp(-0.5, 0.5).exp()


def simulate_scan(factors: Factors, means: Tensor, spacing: float, noise: bool) -> Tensor:
    """Intensities of one acquisition, (X, Y, Z), 0 outside the brain.

    Args:
        means: voxel means of the template maps, (len(CHANNELS), X, Y, Z).
        spacing: voxel size in mm.
        noise: whether to add Rician noise.
    """
    scanner, shape = SCANNERS[factors.scanner], tuple(means.shape[1:])
    rng = np.random.default_rng(factors.key("scan", factors.months))
    jitter = np.array([scanner.grey_jitter, scanner.csf_jitter])
    grey, csf = np.array([scanner.grey, scanner.csf]) + jitter * rng.standard_normal(2).clip(-2, 2)
    level = scanner.level * np.exp(0.2 * rng.standard_normal())
    bias = _draw_bias_field(rng, scanner.bias, spacing, shape)
    t1, grey_map, white_map, mask = means[:4]
    fluid = (mask - grey_map - white_map).clamp(min=0)
    # The mean of each tissue becomes that of the scanner; variation within a tissue is the template's.
    image = t1 + (grey * WHITE_LEVEL - GREY_LEVEL) * grey_map + (csf * WHITE_LEVEL - CSF_LEVEL) * fluid
    image = image.clamp(min=0) / WHITE_LEVEL * bias
    if noise:
        real, imaginary = torch.from_numpy(rng.standard_normal((2, *shape), dtype=np.float32)) * scanner.noise
        image = torch.hypot(image + real, imaginary)
    # At least 1 inside the brain, because 0 is the background.
    return torch.where(mask >= 0.5, (image * level).clamp(min=1), torch.zeros(()))
