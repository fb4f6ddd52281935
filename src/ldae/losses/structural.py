"""Structural similarity (SSIM; Wang et al. 2004, doi 10.1109/TIP.2003.819861) in 3D, differentiable.

K1 = 0.01, K2 = 0.03, data range 1, Gaussian window with a standard deviation of 1.5 voxels. The Gaussian mean is a
product with a banded matrix along each axis, which is fast on a CPU in the forward and in the backward pass.
"""

import torch
from torch import Tensor

WIDTH, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def fitting_width(shape: tuple[int, ...], width: int) -> int:
    """`width`, or the largest odd number that is not larger than the smallest axis of the volume."""
    smallest = min(shape)
    return min(width, smallest - 1 + smallest % 2)


def _gaussian_matrix(size: int, width: int, like: Tensor) -> Tensor:
    """(size, size) matrix whose product with a line of voxels is their Gaussian mean, with replicated borders."""
    offset = torch.arange(width, device=like.device) - width // 2
    weights = torch.exp(-(offset.to(like.dtype) ** 2) / (2 * SIGMA**2))
    columns = (torch.arange(size, device=like.device)[:, None] + offset).clamp(0, size - 1)
    matrix = torch.zeros(size, size, dtype=like.dtype, device=like.device)
    return matrix.scatter_add_(1, columns, (weights / weights.sum()).expand(size, width))


def gaussian_mean(x: Tensor, width: int) -> Tensor:
    """Mean of (B, C, X, Y, Z) over a Gaussian window of `width` voxels, with replicated borders; the same shape."""
    for axis in (2, 3, 4):
        matrix = _gaussian_matrix(x.shape[axis], width, x)
        x = (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    return x


def ssim_maps(x: Tensor, y: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """SSIM and its contrast-structure factor at every voxel of volumes (B, 1, X, Y, Z) in [0, 1], same shape each."""
    mx, my, xx, yy, xy = gaussian_mean(torch.cat([x, y, x * x, y * y, x * y], 1), width).split(1, 1)
    covariance, variances = xy - mx * my, (xx - mx * mx) + (yy - my * my)
    structure = (2 * covariance + C2) / (variances + C2)
    return structure * (2 * mx * my + C1) / (mx * mx + my * my + C1), structure


def ssim_map(x: Tensor, y: Tensor, width: int = WIDTH) -> Tensor:
    """SSIM at every voxel of volumes (B, 1, X, Y, Z) in [0, 1], same shape. A smaller volume gets a smaller window."""
    return ssim_maps(x.float(), y.float(), fitting_width(tuple(x.shape[2:]), width))[0]


def structural_dissimilarity(reconstruction: Tensor, x: Tensor) -> Tensor:
    """1 - SSIM, mean over voxels and batch, a scalar."""
    return 1 - ssim_map(reconstruction, x).mean()
