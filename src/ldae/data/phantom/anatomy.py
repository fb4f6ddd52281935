"""Velocity fields that change the anatomy, and the strengths of them that give the wanted volumes.

There are three effects, each a field along the gradient of a smoothed map: the ventricles grow, the hippocampi shrink,
and the sulci widen (the tissue recedes from the CSF while the surface of the brain stays in place). A fourth field
moves the widening of the sulci from the front of the head to the back, and a random smooth field gives each subject its
own shape. Their sum is exponentiated. The relation between strengths and volumes is measured once in each process.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ldae.data.phantom.deform import exponentiate, sample_maps
from ldae.data.phantom.template_maps import TemplateMaps, load_template

GRID = 3  # voxel size of the velocity fields in mm
MAP_GRID = 2  # voxel size in mm of the maps that volumes are measured on during calibration
REGIONS = ("ventricle", "hippocampus", "brain", "head")
SMOOTHING = {"ventricle": 10.0, "hippocampus": 5.0, "sulci": 4.0}  # mm
# Strengths in mm at which the volumes are measured; strengths outside of this range are not used.
DESIGN = ((-5, -2, 0, 4, 9, 15, 20, 26), (-4, -2, 0, 2, 4, 6), (-6, -3, 0, 4, 8, 12, 17))
# Individual differences that remain after registration: (correlation length, standard deviation of displacement) in mm.
SHAPE_SCALES = ((36.0, 1.4), (13.0, 0.4))
BACK_TO_FRONT = 30.0  # mm over which the field of the sulci changes from widening to narrowing
SYMMETRY = 0.85  # fraction of the random field's variance that is the same on both sides


@dataclass(frozen=True)
class VelocityFields:
    """The velocity fields on one grid.

    Attributes:
        velocities: (3 effects, 3, X, Y, Z) at unit strength: ventricles, hippocampi, sulci.
        pattern: (3, X, Y, Z), widens the sulci at the back and narrows them in front.
        points: (X, Y, Z, 3) centres of the voxels in mm.
        extent: (3,) size of the box in mm.
        head: (X, Y, Z) brain mask as fractions.
    """

    velocities: Tensor
    pattern: Tensor
    points: Tensor
    extent: Tensor
    head: Tensor

    def displacement(self, strengths: np.ndarray, shape: Tensor | float = 0.0, sign: int = -1) -> Tensor:
        """The displacement of exp(sign * v), (3, X, Y, Z) mm, where v is the sum of all fields.

        Args:
            strengths: (3,) of the effects.
            shape: further velocities (3, X, Y, Z).
            sign: -1 maps points of the subject to points of the template.
        """
        velocity = torch.einsum("e,ecxyz->cxyz", torch.as_tensor(strengths, dtype=torch.float32), self.velocities)
        return exponentiate(sign * (velocity + shape), self.points, self.extent)


def region_maps(base: TemplateMaps) -> Tensor:
    """Fractions of ventricles, hippocampi, brain tissue and head (the brain mask), (len(REGIONS), X, Y, Z)."""
    return torch.stack([
        base.channel("ventricle_r") + base.channel("ventricle_l"),
        base.channel("hippocampus_r") + base.channel("hippocampus_l"),
        base.channel("grey") + base.channel("white"),
        base.channel("mask"),
    ])  # fmt: skip


def _smoothed_gradient(volume: np.ndarray, sigma: float) -> np.ndarray:
    """Gradient (3, X, Y, Z) of the volume smoothed by `sigma` mm, scaled so that the largest vector has length 1."""
    from scipy import ndimage

    field = np.stack(np.gradient(ndimage.gaussian_filter(volume, sigma / GRID), GRID))
    return field / np.sqrt((field**2).sum(0)).max()


@lru_cache(maxsize=1)
def load_fields() -> VelocityFields:
    """The fields at unit strength, that is with a largest velocity of 1 mm."""
    base = load_template(GRID)
    ventricle, hippocampus, brain, _ = region_maps(base).numpy()
    inside = np.clip((base.depth[0].numpy() - 2) / 4, 0, 1)  # keeps the surface of the brain in place
    # CSF outside the ventricles. Outside the head counts as CSF, so that the cortex recedes from the surface.
    sulci = np.clip(1 - brain - ventricle, 0, 1)
    velocities = np.stack([
        -_smoothed_gradient(ventricle, SMOOTHING["ventricle"]),
        _smoothed_gradient(hippocampus, SMOOTHING["hippocampus"]),
        -_smoothed_gradient(sulci, SMOOTHING["sulci"]),
    ]) * inside  # fmt: skip
    points = base.points()
    pattern = _widen_back_not_front(velocities[2], brain, points[..., 1].numpy())
    maps = (torch.from_numpy(field).float() for field in (velocities, pattern))
    return VelocityFields(*maps, points, base.extent, base.channel("mask"))


def _widen_back_not_front(sulci: np.ndarray, brain: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The velocities of the sulci (3, X, Y, Z) at the back and their opposite in front.

    Both are balanced so that to first order the volume of the brain does not change.

    Args:
        sulci: (3, X, Y, Z) velocities that widen the sulci.
        brain: (X, Y, Z) fractions of brain tissue.
        y: (X, Y, Z) coordinates in mm.
    """
    loss = (sulci * np.stack(np.gradient(brain, GRID))).sum(0)
    weight = -np.tanh(y / BACK_TO_FRONT)
    return sulci * (weight - (weight * loss).sum() / loss.sum())


def draw_shape_field(seed: int) -> Tensor:
    """A smooth random velocity field for one subject, (3, X, Y, Z) mm, without net translation of the brain."""
    fields, rng = load_fields(), np.random.default_rng(seed)
    total = torch.zeros(fields.velocities.shape[1:])
    for scale, deviation in SHAPE_SCALES:
        bases = _smooth_basis(scale)
        control = torch.from_numpy(rng.standard_normal((3, *(b.shape[1] for b in bases)))).float()
        total += deviation * torch.einsum("cijk,xi,yj,zk->cxyz", control, *bases)
    mirrored = total.flip(1) * torch.tensor([-1.0, 1.0, 1.0])[:, None, None, None]
    total = ((total + mirrored) * SYMMETRY**0.5 + (total - mirrored) * (1 - SYMMETRY) ** 0.5) / 2**0.5
    return total - (total * fields.head).sum((1, 2, 3), keepdim=True) / fields.head.sum()


@lru_cache(maxsize=4)
def _smooth_basis(scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian basis functions along each axis, (X, count).

    With white noise as coefficients, they give a field of unit variance with a correlation length of `scale` mm.
    """
    fields, out = load_fields(), []
    for axis, extent in enumerate(fields.extent.tolist()):
        centres = torch.movedim(fields.points[..., axis], axis, 0)[:, 0, 0]
        knots = torch.arange(-extent / 2 - scale, extent / 2 + 1.5 * scale, scale)
        basis = torch.exp(-((centres[:, None] - knots) ** 2) / scale**2)
        out.append(basis / basis.square().sum(1, keepdim=True).sqrt())
    return tuple(out)


def measure_volumes(displacement: Tensor) -> np.ndarray:
    """Volumes of the deformed regions in mm3, without scaling of the head, (len(REGIONS),)."""
    fields, base = load_fields(), load_template(MAP_GRID)
    warped = sample_maps(region_maps(base), fields.points + displacement.movedim(0, -1), fields.extent)
    return warped.sum((1, 2, 3)).numpy().astype(float) * GRID**3


@dataclass(frozen=True)
class Calibration:
    """How the volumes change with the strength of each effect.

    Attributes:
        knots: (effects, N) strengths.
        curves: (effects, N, len(REGIONS)) changes of the log volumes.
        log_template: (len(REGIONS),) log volumes of the template.
    """

    knots: np.ndarray
    curves: np.ndarray
    log_template: np.ndarray

    def effect(self, index: int, strength: float) -> np.ndarray:
        """Change of the log volume of each region by one effect, (len(REGIONS),)."""
        return np.array([np.interp(strength, self.knots[index], curve) for curve in self.curves[index].T])

    def solve(self, log_volumes: np.ndarray, correction: np.ndarray, rounds: int = 12) -> tuple[np.ndarray, float]:
        """Find the strengths (effects,) and the linear scale of the head that give `log_volumes`.

        Effects are nearly additive in the logarithm. Each of them changes mainly one region, so alternating between
        the effects converges.

        Args:
            log_volumes: (len(REGIONS),).
            correction: (len(REGIONS),) difference between true and additive log volumes in this subject.
        """
        wanted = log_volumes - self.log_template - correction
        strengths, log_scale = np.zeros(3), 0.0
        for _ in range(rounds):
            effects = np.stack([self.effect(i, s) for i, s in enumerate(strengths)])
            log_scale = (wanted[3] - effects[:, 3].sum()) / 3
            for i in range(3):
                own = wanted[i] - 3 * log_scale - (effects[:, i].sum() - effects[i, i])
                rising = np.argsort(self.curves[i, :, i])
                strengths[i] = np.interp(own, self.curves[i, rising, i], self.knots[i, rising])
        return strengths, float(np.exp(log_scale))


@lru_cache(maxsize=1)
def load_calibration() -> Calibration:
    """Measure the three curves, once in each process; this takes about two seconds."""
    from scipy.interpolate import PchipInterpolator

    fields = load_fields()
    template = np.log(measure_volumes(torch.zeros_like(fields.velocities[0])))
    knots, curves = [], []
    for index, strengths in enumerate(DESIGN):
        measured = [
            template if s == 0 else np.log(measure_volumes(fields.displacement(s * np.eye(3)[index])))
            for s in strengths
        ]
        knots.append(np.linspace(strengths[0], strengths[-1], 200))
        curves.append(PchipInterpolator(strengths, np.stack(measured) - template)(knots[-1]))
    return Calibration(np.stack(knots), np.stack(curves), template)
