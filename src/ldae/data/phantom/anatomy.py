"""The velocity fields that change the anatomy, and the strengths that reach given volumes.

Three fields, each along the gradient of a smoothed map: the ventricles grow, the hippocampi shrink, the sulci widen
(the tissue recedes from the CSF while the brain's edge stays where it is). A fourth moves that widening from the front
of the head to its back, and a random smooth field makes the individual; all of them are exponentiated once. What
strength gives which volume is measured once per process on a small design and fitted.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ldae.data.phantom.base import TemplateMaps, load_template
from ldae.data.phantom.deform import exponentiate, sample_maps

GRID = 3  # mm, of the velocity fields
MAP_GRID = 2  # mm, of the maps that measure volumes during calibration
REGIONS = ("ventricle", "hippocampus", "brain", "head")
SMOOTHING = {"ventricle": 10.0, "hippocampus": 5.0, "sulci": 4.0}  # mm
# Strengths at which the volumes are measured, in mm: what lies outside is not reached.
DESIGN = ((-5, -2, 0, 4, 9, 15, 20, 26), (-4, -2, 0, 2, 4, 6), (-6, -3, 0, 4, 8, 12, 17))
# (correlation, standard deviation of the displacement) in mm: what registration to a template leaves of an individual.
SHAPE_SCALES = ((36.0, 1.4), (13.0, 0.4))
BACK_TO_FRONT = 30.0  # mm over which the pattern of the sulci turns from widening to narrowing
SYMMETRY = 0.85  # share of the random field's variance that is the same on both sides


@dataclass(frozen=True)
class VelocityFields:
    """`velocities` (3 effects, 3, X, Y, Z) of unit strength, `pattern` (3, X, Y, Z) of the sulci's, grid `points`
    (X, Y, Z, 3) mm, `extent` (3,) mm, `head` (X, Y, Z) the brain mask as fractions."""

    velocities: Tensor
    pattern: Tensor
    points: Tensor
    extent: Tensor
    head: Tensor

    def displacement(self, strengths: np.ndarray, shape: Tensor | float = 0.0, sign: int = -1) -> Tensor:
        """exp(sign * v), v of `strengths` (3,) plus `shape`; -1 maps a subject's points to the template's."""
        velocity = torch.einsum("e,ecxyz->cxyz", torch.as_tensor(strengths, dtype=torch.float32), self.velocities)
        return exponentiate(sign * (velocity + shape), self.points, self.extent)


def region_maps(base: TemplateMaps) -> Tensor:
    """Fractions of ventricle, hippocampus, brain tissue and head (the mask), (len(REGIONS), X, Y, Z)."""
    return torch.stack([
        base.channel("ventricle_r") + base.channel("ventricle_l"),
        base.channel("hippocampus_r") + base.channel("hippocampus_l"),
        base.channel("grey") + base.channel("white"),
        base.channel("mask"),
    ])  # fmt: skip


def _gradient(volume: np.ndarray, sigma: float) -> np.ndarray:
    """Gradient of the volume smoothed by `sigma` mm, (3, X, Y, Z), scaled to a largest length of 1."""
    from scipy import ndimage

    field = np.stack(np.gradient(ndimage.gaussian_filter(volume, sigma / GRID), GRID))
    return field / np.sqrt((field**2).sum(0)).max()


@lru_cache(maxsize=1)
def load_fields() -> VelocityFields:
    """The fields at unit strength (a largest velocity of 1 mm)."""
    base = load_template(GRID)
    ventricle, hippocampus, brain, _ = region_maps(base).numpy()
    inside = np.clip((base.depth[0].numpy() - 2) / 4, 0, 1)  # no effect may move the brain's edge
    # CSF outside the ventricles; what lies outside the head counts as CSF, so that the cortex recedes from its edge.
    sulci = np.clip(1 - brain - ventricle, 0, 1)
    velocities = np.stack([
        -_gradient(ventricle, SMOOTHING["ventricle"]),
        _gradient(hippocampus, SMOOTHING["hippocampus"]),
        -_gradient(sulci, SMOOTHING["sulci"]),
    ]) * inside  # fmt: skip
    points = base.points()
    pattern = _back_not_front(velocities[2], brain, points[..., 1].numpy())
    maps = (torch.from_numpy(field).float() for field in (velocities, pattern))
    return VelocityFields(*maps, points, base.extent, base.channel("mask"))


def _back_not_front(sulci: np.ndarray, brain: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The sulci's velocities (3, X, Y, Z) behind and their opposite in front, balanced: to first order the
    brain keeps its volume."""
    loss = (sulci * np.stack(np.gradient(brain, GRID))).sum(0)
    weight = -np.tanh(y / BACK_TO_FRONT)
    return sulci * (weight - (weight * loss).sum() / loss.sum())


def draw_shape_field(seed: int) -> Tensor:
    """An individual's smooth random velocity field, (3, X, Y, Z) mm, without net translation of the brain."""
    fields, rng = load_fields(), np.random.default_rng(seed)
    total = torch.zeros(fields.velocities.shape[1:])
    for scale, deviation in SHAPE_SCALES:
        bases = _bumps(scale)
        control = torch.from_numpy(rng.standard_normal((3, *(b.shape[1] for b in bases)))).float()
        total += deviation * torch.einsum("cijk,xi,yj,zk->cxyz", control, *bases)
    mirrored = total.flip(1) * torch.tensor([-1.0, 1.0, 1.0])[:, None, None, None]
    total = ((total + mirrored) * SYMMETRY**0.5 + (total - mirrored) * (1 - SYMMETRY) ** 0.5) / 2**0.5
    return total - (total * fields.head).sum((1, 2, 3), keepdim=True) / fields.head.sum()


@lru_cache(maxsize=4)
def _bumps(scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian bumps along each axis, (X, count): white noise times them has unit variance and `scale` correlation."""
    fields, out = load_fields(), []
    for axis, extent in enumerate(fields.extent.tolist()):
        places = torch.movedim(fields.points[..., axis], axis, 0)[:, 0, 0]
        knots = torch.arange(-extent / 2 - scale, extent / 2 + 1.5 * scale, scale)
        bumps = torch.exp(-((places[:, None] - knots) ** 2) / scale**2)
        out.append(bumps / bumps.square().sum(1, keepdim=True).sqrt())
    return tuple(out)


def measure_volumes(displacement: Tensor) -> np.ndarray:
    """Volumes in mm3 of the deformed regions (no head scaling), (len(REGIONS),)."""
    fields, base = load_fields(), load_template(MAP_GRID)
    warped = sample_maps(region_maps(base), fields.points + displacement.movedim(0, -1), fields.extent)
    return warped.sum((1, 2, 3)).numpy().astype(float) * GRID**3


@dataclass(frozen=True)
class Calibration:
    """What the strength of one effect at a time does: `knots` (effects, N) strengths, `curves` (effects, N,
    len(REGIONS)) changes of the log volumes, `log_template` (len(REGIONS),) the log volumes to start from."""

    knots: np.ndarray
    curves: np.ndarray
    log_template: np.ndarray

    def effect(self, index: int, strength: float) -> np.ndarray:
        """Change of each region's log volume by one effect, (len(REGIONS),)."""
        return np.array([np.interp(strength, self.knots[index], curve) for curve in self.curves[index].T])

    def solve(self, log_volumes: np.ndarray, correction: np.ndarray, rounds: int = 12) -> tuple[np.ndarray, float]:
        """Strengths (effects,) and linear head scale that give `log_volumes` (len(REGIONS),).

        Effects add up in the logarithm, nearly; `correction` (len(REGIONS),) is what they leave unexplained in this
        subject. Each effect owns one region, and what it does to the others is small, so alternating converges.
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
    """Measure the three curves (once per process, about two seconds)."""
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
