"""Multistep solver of the probability-flow ODE in the angle, both ways, one evaluation a step.

With sqrt(A) = cos(phi), sqrt(1 - A) = sin(phi) the ODE that DDIM discretises is dz/dphi = v (arXiv 2202.00512): no
coefficient is singular at either end, A = 1 included, and on unit-Gaussian latents v = 0, so that a perfect network is
solved without any error, where DDIM and DPM-Solver++ (arXiv 2211.01095) shrink the code. On it: the Adams pair,
predictor of Bashforth, corrector of Moulton, with variable steps. The corrector uses the evaluation that the next step
needs anyway (predict, evaluate, correct; as UniPC, arXiv 2302.04867, does), so it costs nothing.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldae.diffusion.grids import Path
from ldae.diffusion.guidance import EpsFn
from ldae.diffusion.prediction import predict_velocity

History = list[tuple[float, Tensor]]  # (phi, v), newest first


def integral_weights(points: Sequence[float], start: float, end: float) -> np.ndarray:
    """w with sum_i w_i f(points_i) = integral of f from start to end, if f is a polynomial of degree < len(points)."""
    width = end - start
    unit = (np.asarray(points) - start) / width
    moments = 1 / np.arange(1, len(unit) + 1)
    return width * np.linalg.solve(np.vander(unit, increasing=True).T, moments)


def _advance(z: Tensor, history: History, start: float, end: float) -> Tensor:
    weights = integral_weights([phi for phi, _ in history], start, end)
    for weight, (_, v) in zip(weights, history, strict=True):
        z = z + float(weight) * v
    return z


def multistep(
    eps_fn: EpsFn, z: Tensor, path: Path, order: int = 2, corrector: bool = True, clip: float | None = None
) -> Tensor:
    """Walk z (B, ...) along the path, ascending (inversion) or descending (sampling).

    Args:
        order: of the predictor and of the corrector (2: trapezoid); the first steps have fewer points and a lower one.
        corrector: correct each step but the last, whose end is not evaluated.
        clip: see `prediction.ask`.
    """
    phi = path.angle
    history: History = []
    origin = z  # where the last step started
    for node in range(len(path) - 1):
        newest = (float(phi[node]), predict_velocity(eps_fn, z, path, node, clip))
        history = [newest, *history][:order]
        if corrector and node > 0:
            z = _advance(origin, history, phi[node - 1], phi[node])
        origin = z
        z = _advance(z, history, phi[node], phi[node + 1])
    return z
