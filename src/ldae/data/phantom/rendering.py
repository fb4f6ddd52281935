"""From a subject's factors to a scan: the deformed template on the scan's grid, and what a scanner makes of it.

Each voxel is the mean of points about 2 mm apart (or one point of the 1 mm template where voxels are small), so that
partial volume is right. Everything random is keyed by (seed, subject, session), never by the anatomy: a counterfactual
keeps the person, the scanner and the noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
import torch
from torch import Tensor

from ldae.data.phantom import SHAPE, SPACING
from ldae.data.phantom.anatomy import REGIONS, draw_shape_field, load_calibration, load_fields, measure_volumes
from ldae.data.phantom.base import CHANNELS, CSF_LEVEL, GREY_LEVEL, LABELS, WHITE_LEVEL, TemplateMaps, load_template
from ldae.data.phantom.deform import sample_maps
from ldae.data.phantom.subjects import Factors, draw_subject, sulcal_pattern, target_volumes

ASPECT_SD = 0.02  # of the logarithm of length, width and height of the head at constant volume
CORRECTIONS = 2


@dataclass(frozen=True)
class Scanner:
    """Tissue intensities relative to white matter, the spread of their jitter, bias field and noise (as a share of
    white matter), and white matter's own arbitrary level.

    The grey matter's jitter is the larger: it moves the mean intensity more than atrophy does, so that the mean alone
    hardly tells the diagnosis.
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


@dataclass(frozen=True)
class RenderedScan:
    """A scan: `image` (X, Y, Z) float32, 0 outside the brain; `labels` (X, Y, Z) uint8, DLMUSE numbers; `affine` RAS;
    `volumes` in mm3 by region, measured on the deformed maps before they become hard labels."""

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    volumes: dict[str, float]
    factors: Factors


Key = Factors | Mapping | tuple[int, int | str, int | str]


def find_factors(key: Key) -> Factors:
    """The factors of a table's row (it must have `phantom_seed`), or of (seed, subject, session).

    Raises KeyError if that subject has no such session.
    """
    if isinstance(key, Factors):
        return key
    if not isinstance(key, tuple):
        key = (int(key["phantom_seed"]), key["subject"], key["session"])
    seed, subject, session = key
    number, months = int(str(subject).removeprefix("sub-")), int(str(session).removeprefix("ses-").removeprefix("M"))
    for factors in draw_subject(seed, number):
        if factors.months == months:
            return factors
    raise KeyError(f"phantom subject {number} of seed {seed} has no session at {months} months")


@lru_cache(maxsize=8)
def _person(seed: int, subject: int) -> tuple[Tensor, np.ndarray, Tensor]:
    """What stays with a subject through ageing: the random field (3, X, Y, Z), its correction of the log volumes, and
    the head's proportions (3,)."""
    first = draw_subject(seed, subject)[0]
    shape = draw_shape_field(first.key("shape"))
    wanted, correction = _log_targets(first), np.zeros(len(REGIONS))
    for _ in range(CORRECTIONS):
        strengths, scale = load_calibration().solve(wanted, correction)
        built = np.log(measure_volumes(_displacement(first, strengths, shape))) + 3 * np.log(scale)
        correction += built - wanted
    aspect = np.random.default_rng(first.key("aspect")).normal(0, ASPECT_SD, 3)
    return shape, correction, torch.from_numpy(np.exp(aspect - aspect.mean())).float()


def _log_targets(factors: Factors) -> np.ndarray:
    wanted = target_volumes(factors)
    return np.log([wanted[region] for region in REGIONS])


def compute_deformation(factors: Factors) -> tuple[Tensor, Tensor]:
    """A subject's displacement from head-scaled points to the template, (3, X, Y, Z) mm, and the head's scale (3,)."""
    shape, correction, aspect = _person(factors.seed, factors.subject)
    strengths, scale = load_calibration().solve(_log_targets(factors), correction)
    return _displacement(factors, strengths, shape), aspect * scale


def _displacement(factors: Factors, strengths: np.ndarray, shape: Tensor) -> Tensor:
    """Of the effects' `strengths`, the sulci's pattern and the random field `shape` together, (3, X, Y, Z) mm."""
    fields = load_fields()
    return fields.displacement(strengths, shape + sulcal_pattern(factors) * fields.pattern)


def _axes(spacing: float, shape: tuple[int, ...]) -> list[Tensor]:
    """Voxel centres along each axis in mm from the middle of the field of view."""
    return [(torch.arange(n, dtype=torch.float32) - (n - 1) / 2) * spacing for n in shape]


def _voxel_means(factors: Factors, spacing: float, shape: tuple[int, ...]) -> Tensor:
    """The deformed template maps as voxel means, (len(CHANNELS), X, Y, Z)."""
    per_axis = ceil(spacing / 2.5 - 1e-6)
    base = load_template(1 if spacing / per_axis < 1.75 else 2)
    displacement, scale = compute_deformation(factors)

    def to_template(points: Tensor) -> Tensor:
        points = points / scale
        return points + sample_maps(displacement, points, base.extent, "border").movedim(0, -1)

    centres = torch.stack(torch.meshgrid(*_axes(spacing, shape), indexing="ij"), dim=-1).reshape(-1, 3)
    coarse = load_template(3)
    # Only voxels that may touch the head are sampled finely.
    inside = sample_maps(coarse.depth, to_template(centres), base.extent, "border")[0] > -(1.1 * spacing + 1)
    inside = inside.nonzero()[:, 0]
    steps = ((torch.arange(per_axis) + 0.5) / per_axis - 0.5) * spacing
    total = torch.zeros(len(CHANNELS), len(inside))
    for offset in torch.cartesian_prod(steps, steps, steps).reshape(-1, 3):
        total += sample_maps(base.maps, to_template(centres[inside] + offset), base.extent)
    means = torch.zeros(len(CHANNELS), len(centres))
    means[:, inside] = total / per_axis**3
    return means.reshape(len(CHANNELS), *shape)


def _bias(rng: np.random.Generator, amplitude: float, spacing: float, shape: tuple[int, ...]) -> Tensor:
    """A smooth multiplicative field around 1, (X, Y, Z): the exponential of a polynomial of degree 2 per axis."""
    coefficients = rng.standard_normal((3, 3, 3)) * amplitude / 2
    coefficients[0, 0, 0] = 0
    powers = [torch.stack([axis**0, axis / 80, (axis / 80) ** 2 - 0.3], dim=1) for axis in _axes(spacing, shape)]
    return torch.einsum("ijk,xi,yj,zk->xyz", torch.from_numpy(coefficients).float(), *powers).clamp(-0.5, 0.5).exp()


def _scan(factors: Factors, means: Tensor, spacing: float, noise: bool) -> Tensor:
    """Intensities (X, Y, Z) of one acquisition of the maps `means`, 0 outside the brain."""
    scanner, shape = SCANNERS[factors.scanner], tuple(means.shape[1:])
    rng = np.random.default_rng(factors.key("scan", factors.months))
    jitter = np.array([scanner.grey_jitter, scanner.csf_jitter])
    grey, csf = np.array([scanner.grey, scanner.csf]) + jitter * rng.standard_normal(2).clip(-2, 2)
    level = scanner.level * np.exp(0.2 * rng.standard_normal())
    bias = _bias(rng, scanner.bias, spacing, shape)
    t1, grey_map, white_map, mask = means[:4]
    fluid = (mask - grey_map - white_map).clamp(min=0)
    # Tissue means move to the scanner's; what the template shows within a tissue stays.
    image = t1 + (grey * WHITE_LEVEL - GREY_LEVEL) * grey_map + (csf * WHITE_LEVEL - CSF_LEVEL) * fluid
    image = image.clamp(min=0) / WHITE_LEVEL * bias
    if noise:
        real, imaginary = torch.from_numpy(rng.standard_normal((2, *shape), dtype=np.float32)) * scanner.noise
        image = torch.hypot(image + real, imaginary)
    # A scan in the brain is never exactly 0: that is the background's value.
    return torch.where(mask >= 0.5, (image * level).clamp(min=1), torch.zeros(()))


def _labels(means: Tensor) -> Tensor:
    """Hard labels (X, Y, Z) uint8: the region that fills most of a voxel, 1 = other brain, 0 = background."""
    regions = means[CHANNELS.index("mask") + 1 :]
    mask = means[CHANNELS.index("mask")]
    rest = mask - regions.sum(0)
    numbers = torch.tensor([1, *LABELS.values()], dtype=torch.uint8)
    labels = numbers[torch.cat([rest[None], regions]).argmax(0)]
    return torch.where(mask >= 0.5, labels, torch.zeros((), dtype=torch.uint8))


def _affine(base: TemplateMaps, spacing: float, shape: tuple[int, ...]) -> np.ndarray:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = base.centre - spacing * (np.array(shape) - 1) / 2
    return affine


def _measure(means: Tensor, spacing: float) -> dict[str, float]:
    sums = dict(zip(CHANNELS, (means.sum((1, 2, 3), dtype=torch.float64) * spacing**3).tolist(), strict=True))
    return {
        "ventricle": sums["ventricle_r"] + sums["ventricle_l"],
        "hippocampus": sums["hippocampus_r"] + sums["hippocampus_l"],
        "brain": sums["grey"] + sums["white"],
        "head": sums["mask"],
    }


def render(
    key: Key,
    severity: float | None = None,
    age: float | None = None,
    noise: bool = True,
    spacing: float = SPACING,
    shape: tuple[int, int, int] = SHAPE,
) -> RenderedScan:
    """One scan; with `severity` or `age` its true counterfactual: same person, session, scanner and noise.

    `key` is a row of a phantom table or (seed, subject, session); `spacing` in mm, `shape` in voxels. Without `noise`
    contrast and bias field stay, the Rician noise goes. Raises KeyError for an unknown session.
    """
    factors = find_factors(key).changed(severity, age)
    with torch.no_grad():
        means = _voxel_means(factors, spacing, tuple(shape))
        image, labels = _scan(factors, means, spacing, noise), _labels(means)
    affine = _affine(load_template(3), spacing, tuple(shape))
    return RenderedScan(image.numpy(), labels.numpy(), affine, _measure(means, spacing), factors)


def render_labels(
    key: Key,
    severity: float | None = None,
    age: float | None = None,
    spacing: float = SPACING,
    shape: tuple[int, int, int] = SHAPE,
) -> np.ndarray:
    """The label map (X, Y, Z) of a scan or of its counterfactual."""
    return render(key, severity, age, False, spacing, shape).labels
