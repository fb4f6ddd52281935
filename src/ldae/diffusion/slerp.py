"""Spherical interpolation, which keeps the norm of Gaussian noise where a straight line would shrink it."""

import torch
from torch import Tensor


def slerp_weights(a: Tensor, b: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """(B, 1, ...) float64 weights of a and b (B, ...) at share t of the arc between them; see `slerp`."""
    left, right = a.flatten(1).double(), b.flatten(1).double()
    t = torch.as_tensor(t, dtype=torch.float64, device=a.device).expand(len(a))
    norms = left.norm(dim=1) * right.norm(dim=1)
    omega = ((left * right).sum(1) / norms.clamp(min=torch.finfo(torch.float64).tiny)).clamp(-1, 1).arccos()
    sine = omega.sin()
    straight = sine < 1e-6
    safe = torch.where(straight, torch.ones_like(sine), sine)
    shape = (-1, *[1] * (a.ndim - 1))
    weight_a = torch.where(straight, 1 - t, ((1 - t) * omega).sin() / safe)
    weight_b = torch.where(straight, t, (t * omega).sin() / safe)
    return weight_a.view(shape), weight_b.view(shape)


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """The point at share t of the arc from a to b, per sample.

    Args:
        a, b: (B, ...).
        t: in [0, 1], a number or (B,).

    Returns:
        (B, ...) in the dtype of a; a at t = 0, b at t = 1. Where a and b are (anti)parallel: the straight line.
    """
    weight_a, weight_b = slerp_weights(a, b, t)
    return (weight_a * a + weight_b * b).to(a.dtype)
