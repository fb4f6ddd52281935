"""Rendering of a scan from a subject's factors: the deformed template on the scan's grid, then the scanner's effects.

Each voxel is the mean of points about 2 mm apart (one point if voxels are small), which gives correct partial volumes.
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
from ldae.data.phantom.deform import sample_maps
from ldae.data.phantom.scanner import simulate_scan, voxel_centres
from ldae.data.phantom.subjects import Factors, draw_subject, sulcal_pattern, target_volumes
from ldae.data.phantom.template_maps import (
    CHANNELS,
    LABELS,
    TemplateMaps,
    load_template,
)

ASPECT_SD = 0.02  # of the logarithm of length, width and height of the head at constant volume
CORRECTIONS = 2  # rounds of correcting the strengths of the effects by the volumes that they give


@dataclass(frozen=True)
class RenderedScan:
    """A synthetic scan.

    Attributes:
        image: (X, Y, Z) float32, 0 outside the brain.
        labels: (X, Y, Z) uint8, DLMUSE numbers; 1 is other brain, 0 background.
        affine: voxel to mm, RAS, 4x4.
        volumes: in mm3 by region, measured on the deformed maps before they are turned into labels.
        factors: of the subject at this session.
    """

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    volumes: dict[str, float]
    factors: Factors


Key = Factors | Mapping | tuple[int, int | str, int | str]  # or a row of the table, or (seed, subject, session)


def find_factors(key: Key) -> Factors:
    """The factors of a row of the table (with `phantom_seed`), or of (seed, subject, session).

    A row may be of any month, because the sessions of a cohort can be chosen (`make_cohort`).

    Raises:
        KeyError: (seed, subject, session) is none of the sessions that are drawn for this subject.
    """
    if isinstance(key, Factors):
        return key
    is_row = not isinstance(key, tuple)
    seed, subject, session = (int(key["phantom_seed"]), key["subject"], key["session"]) if is_row else key
    number, months = int(str(subject).removeprefix("sub-")), int(str(session).removeprefix("ses-").removeprefix("M"))
    for factors in draw_subject(seed, number, (months,) if is_row else None):
        if factors.months == months:
            return factors
    raise KeyError(f"phantom subject {number} of seed {seed} has no session at {months} months")


@lru_cache(maxsize=8)
def _draw_person(seed: int, subject: int) -> tuple[Tensor, np.ndarray, Tensor]:
    """What is the same in all sessions of a subject.

    Returns:
        The random field (3, X, Y, Z) mm, the correction of the log volumes (len(REGIONS),), see Calibration.solve, and
        the proportions of the head (3,).
    """
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
    """The displacement from points of the subject, divided by the scale of the head, to points of the template.

    Returns:
        Displacement (3, X, Y, Z) mm, and the scale of the head along each axis (3,).
    """
    shape, correction, aspect = _draw_person(factors.seed, factors.subject)
    strengths, scale = load_calibration().solve(_log_targets(factors), correction)
    return _displacement(factors, strengths, shape), aspect * scale


def _displacement(factors: Factors, strengths: np.ndarray, shape: Tensor) -> Tensor:
    """The displacement (3, X, Y, Z) mm by the effects, the pattern of the sulci and the random field `shape`."""
    fields = load_fields()
    return fields.displacement(strengths, shape + sulcal_pattern(factors) * fields.pattern)


def _average_maps(factors: Factors, spacing: float, shape: tuple[int, ...]) -> Tensor:
    """Means of the deformed template maps over each voxel, (len(CHANNELS), X, Y, Z)."""
    per_axis = ceil(spacing / 2.5 - 1e-6)
    base = load_template(1 if spacing / per_axis < 1.75 else 2)
    displacement, scale = compute_deformation(factors)

    def to_template(points: Tensor) -> Tensor:
        points = points / scale
        return points + sample_maps(displacement, points, base.extent, "border").movedim(0, -1)

    centres = torch.stack(torch.meshgrid(*voxel_centres(spacing, shape), indexing="ij"), dim=-1).reshape(-1, 3)
    coarse = load_template(3)
    # Only voxels that may overlap the head are sampled finely.
    inside = sample_maps(coarse.depth, to_template(centres), base.extent, "border")[0] > -(1.1 * spacing + 1)
    inside = inside.nonzero()[:, 0]
    steps = ((torch.arange(per_axis) + 0.5) / per_axis - 0.5) * spacing
    total = torch.zeros(len(CHANNELS), len(inside))
    for offset in torch.cartesian_prod(steps, steps, steps).reshape(-1, 3):
        total += sample_maps(base.maps, to_template(centres[inside] + offset), base.extent)
    means = torch.zeros(len(CHANNELS), len(centres))
    means[:, inside] = total / per_axis**3
    return means.reshape(len(CHANNELS), *shape)


def _assign_labels(means: Tensor) -> Tensor:
    """Labels (X, Y, Z) uint8: the region that fills most of each voxel, 1 for other brain, 0 for background."""
    regions = means[CHANNELS.index("mask") + 1 :]
    mask = means[CHANNELS.index("mask")]
    rest = mask - regions.sum(0)
    numbers = torch.tensor([1, *LABELS.values()], dtype=torch.uint8)
    labels = numbers[torch.cat([rest[None], regions]).argmax(0)]
    return torch.where(mask >= 0.5, labels, torch.zeros((), dtype=torch.uint8))


def _make_affine(base: TemplateMaps, spacing: float, shape: tuple[int, ...]) -> np.ndarray:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = base.centre - spacing * (np.array(shape) - 1) / 2
    return affine


def _measure_regions(means: Tensor, spacing: float) -> dict[str, float]:
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
    """Render a scan or, with another `severity` or `age`, its true counterfactual.

    A counterfactual has the same subject, session, scanner and noise.

    Args:
        key: a row of a phantom table or (seed, subject, session).
        severity, age: instead of the subject's own; age in years.
        noise: False leaves out the Rician noise, but not the contrast and the bias field.
        spacing: voxel size in mm.
        shape: number of voxels along each axis.

    Raises:
        KeyError: the subject has no such session.
    """
    factors = find_factors(key).changed(severity, age)
    with torch.no_grad():
        means = _average_maps(factors, spacing, tuple(shape))
        image, labels = simulate_scan(factors, means, spacing, noise), _assign_labels(means)
    affine = _make_affine(load_template(3), spacing, tuple(shape))
    return RenderedScan(image.numpy(), labels.numpy(), affine, _measure_regions(means, spacing), factors)


def render_labels(
    key: Key,
    severity: float | None = None,
    age: float | None = None,
    spacing: float = SPACING,
    shape: tuple[int, int, int] = SHAPE,
) -> np.ndarray:
    """The label map (X, Y, Z) of a scan or of its counterfactual; arguments as of `render`."""
    return render(key, severity, age, False, spacing, shape).labels
