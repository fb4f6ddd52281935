"""How much a structure grows between two images of one brain, by registering them to each other.

The difference in intensity says little about structures without contrast: on phantoms at 3 mm, intensities inside and
around the hippocampi see a true loss of 16 % as a gain of 5 %, because the fluid around them grows, too. Registered to
the image before, the image after shows how every voxel of the label map was deformed (tensor-based morphometry): the
volume of a structure changes by the mean determinant of the deformation over it.

The registration is that of Thirion's demons (doi 10.1016/S1361-8415(98)80022-4) with a smoothed update and the gradient
of both images, first at half the resolution. On six true counterfactuals of phantoms at 3 mm (severity 0 to 1), it finds
a loss of the hippocampi of 14 % where 15.5 % are true, and a growth of the ventricles of 65 % where 72 % are true. Its
smoothness makes small changes of small structures smaller: compare with a true counterfactual measured likewise.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ITERATIONS = 20  # at each of the two resolutions
SMOOTHING = 1.5  # voxels, standard deviation of the Gaussian that smooths each update
NOISE = 1e-4  # squared gradient, of intensities in [0, 1], below which a voxel hardly moves
MARGIN = 8  # voxels around the structures that take part in the registration


@torch.no_grad()
def measure_growth(before: Tensor, after: Tensor, fractions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The volume of each structure in the images after, divided by that before, (B,) each; NaN where it is absent.

    Args:
        before, after: images (B, 1, X, Y, Z) in [0, 1].
        fractions: by structure the fraction of each voxel of the images before that it fills, (B, X, Y, Z).
    """
    if not fractions:
        return {}
    box = _bounding_box([part.to(before.device) for part in fractions.values()])
    before, after = (image[(slice(None), slice(None), *box)].float() for image in (before, after))
    expansion = jacobian_determinant(register(before, after))  # (B, x, y, z)
    growth = {}
    for name, fraction in fractions.items():
        weight = fraction.to(before.device)[(slice(None), *box)].float()
        growth[name] = (weight * expansion).sum((1, 2, 3)) / weight.sum((1, 2, 3))
    return growth


def register(fixed: Tensor, moving: Tensor) -> Tensor:
    """The displacement u in voxels, (B, 3, X, Y, Z), for which moving(x + u(x)) is close to fixed(x).

    Args:
        fixed, moving: images (B, 1, X, Y, Z) in [0, 1] of one brain with one contrast, such as two decoded ones.
    """
    displacement = torch.zeros(len(fixed), 3, *fixed.shape[2:], device=fixed.device)
    if min(fixed.shape[2:]) >= 4:
        coarse = [F.avg_pool3d(image, 2) for image in (fixed, moving)]
        found = _follow_demons(*coarse, torch.zeros(len(fixed), 3, *coarse[0].shape[2:], device=fixed.device))
        displacement = 2 * F.interpolate(found, size=fixed.shape[2:], mode="trilinear")
    return _follow_demons(fixed, moving, displacement)


def _follow_demons(fixed: Tensor, moving: Tensor, displacement: Tensor) -> Tensor:
    own_gradient = _gradient(fixed)
    for _ in range(ITERATIONS):
        warped = _warp(moving, displacement)
        gradient, difference = (_gradient(warped) + own_gradient) / 2, fixed - warped
        force = difference * gradient / (gradient.square().sum(1, keepdim=True) + difference.square() + NOISE)
        displacement = displacement + _smooth(force)
    return displacement


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """Determinant of the derivative of x + u(x), (B, X, Y, Z): 2 where the image after is twice as large."""
    columns = torch.stack(torch.gradient(displacement, dim=(2, 3, 4)), -1).movedim(1, -2)  # (B, X, Y, Z, 3, 3)
    return torch.linalg.det(columns + torch.eye(3, device=displacement.device))


def _gradient(image: Tensor) -> Tensor:
    """(B, 1, X, Y, Z) -> (B, 3, X, Y, Z), per voxel."""
    return torch.stack(torch.gradient(image[:, 0], dim=(1, 2, 3)), 1)


def _warp(image: Tensor, displacement: Tensor) -> Tensor:
    """image(x + u(x)), (B, 1, X, Y, Z)."""
    axes = [torch.arange(size, dtype=torch.float32, device=image.device) for size in image.shape[2:]]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij")) + displacement  # (B, 3, X, Y, Z)
    last = torch.tensor([size - 1 for size in image.shape[2:]], device=image.device).view(3, 1, 1, 1).clamp(min=1)
    grid = (2 * points / last - 1).flip(1).movedim(1, -1)
    return F.grid_sample(image, grid, align_corners=True, padding_mode="border")


def _smooth(field: Tensor) -> Tensor:
    """A field (B, 3, X, Y, Z) convolved with a Gaussian along each axis."""
    radius = round(3 * SMOOTHING)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=field.device) / SMOOTHING) ** 2)
    kernel = kernel / kernel.sum()
    for axis in range(3):
        shape, padding = [1] * 5, [0] * 6
        shape[2 + axis] = -1
        padding[2 * (2 - axis)] = padding[2 * (2 - axis) + 1] = radius
        weight = kernel.view(shape).expand(3, 1, *shape[2:]).contiguous()
        field = F.conv3d(F.pad(field, padding, mode="replicate"), weight, groups=3)
    return field


def _bounding_box(fractions: Sequence[Tensor]) -> tuple[slice, ...]:
    """The part (x, y, z) of the volume that contains all structures of all images, and a margin around them."""
    present = torch.stack([part.amax(0) > 0 for part in fractions]).any(0)  # (X, Y, Z)
    box = []
    for axis, size in enumerate(present.shape):
        found = present.movedim(axis, 0).flatten(1).any(1).nonzero()
        low, high = (int(found[0]), int(found[-1])) if len(found) else (0, size - 1)
        box.append(slice(max(low - MARGIN, 0), min(high + MARGIN + 1, size)))
    return tuple(box)
