"""Spherical interpolation, which preserves the norm of Gaussian noise; a straight line would reduce it."""

import torch
from torch import Tensor


def slerp_weights(a: Tensor, b: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """Weights w_a and w_b for which w_a a + w_b b is the point at share t of the arc from a to b, per sample.

    Args:
        a, b: (B, ...), each sample read as one vector.
        t: in [0, 1], a number or (B,); 0 gives a, 1 gives b.

    Returns:
        Two float64 tensors (B, 1, ...). For (anti)parallel a and b: those of the straight line, 1 - t and t.
    """
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
