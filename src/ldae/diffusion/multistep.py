"""Multistep solver of the probability-flow ODE in the angle phi, for sampling and inversion, one evaluation per step.

With sqrt(A) = cos(phi) and sqrt(1 - A) = sin(phi), the ODE that DDIM discretises is dz/dphi = v (arXiv 2202.00512). No
coefficient is singular at either end, including A = 1. For latents that are unit Gaussian v = 0, so a perfect network
is integrated without error, while DDIM and DPM-Solver++ (arXiv 2211.01095) shrink the code. The solver is the Adams
pair with variable steps: an Adams-Bashforth predictor and an Adams-Moulton corrector. The corrector uses the evaluation
that the next step needs in any case (predict, evaluate, correct, as in UniPC, arXiv 2302.04867), so it is free.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ldae.diffusion.grids import Path
from ldae.diffusion.guidance import EpsFn
from ldae.diffusion.prediction import predict_velocity

History = list[tuple[float, Tensor]]  # (phi, v) of the latest evaluations, newest first


def integral_weights(points: Sequence[float], start: float, end: float) -> np.ndarray:
    """w with sum_i w_i f(points_i) = integral of f from start to end, for polynomials f of degree < len(points)."""
    width = end - start
    unit = (np.asarray(points) - start) / width
    moments = 1 / np.arange(1, len(unit) + 1)
    return width * np.linalg.solve(np.vander(unit, increasing=True).T, moments)


def _integrate(z: Tensor, history: History, start: float, end: float) -> Tensor:
    """z at angle `end` from z at `start`, with v replaced by the polynomial through the history."""
    weights = integral_weights([phi for phi, _ in history], start, end)
    for weight, (_, v) in zip(weights, history, strict=True):
        z = z + float(weight) * v
    return z


def multistep(
    eps_fn: EpsFn, z: Tensor, path: Path, order: int = 2, corrector: bool = True, clip: float | None = None
) -> Tensor:
    """z (B, ...) at the end of an ascending (inversion) or descending (sampling) path.

    Args:
        order: of predictor and corrector (2: trapezoid). The first steps have fewer evaluations and a lower order.
        corrector: correct every step except the last, whose end point is not evaluated.
        clip: see `prediction.predict_eps`.
    """
    phi = path.angle
    history: History = []
    origin = z  # start of the latest step
    for node in range(len(path) - 1):
        newest = (float(phi[node]), predict_velocity(eps_fn, z, path, node, clip))
        history = [newest, *history][:order]
        if corrector and node > 0:
            z = _integrate(origin, history, phi[node - 1], phi[node])
        origin = z
        z = _integrate(z, history, phi[node], phi[node + 1])
    return z
