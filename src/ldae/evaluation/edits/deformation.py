"""How much a structure grows between two images of one brain, by registering them to each other.

The difference in intensity says little about structures without contrast: on phantoms at 3 mm, intensities inside and
around the hippocampi see a true loss of 16 % as a gain of 5 %, because the fluid around them grows, too. Registered to
the image before, the image after shows how every voxel of the label map was deformed (tensor-based morphometry): the
volume of a structure changes by the mean determinant of the deformation over it.

The registration minimises sum (fixed - moving(x + u))^2 + STIFFNESS |du/dx|^2 over the displacement u by Gauss-Newton
steps, the linear equations of each solved by conjugate gradients (Horn and Schunck 1981, doi
10.1016/0004-3702(81)90024-2, with warping), after brightness and contrast of the two images are matched. On true
counterfactuals of phantoms at 3 mm, blurred as decoded images are (severity changed by half a unit, age by ten years),
it finds 0.83 to 1.04 of the true change of the hippocampi and 0.68 to 0.87 of that of the ventricles, with the right
sign in every scan. On real scans whose hippocampi were shrunken by 17 %, with and without larger ventricles, it finds 9
to 10 %. So compare with a true counterfactual measured likewise. Fluid that replaces parts of the rim of a hippocampus,
with nothing moved, is not recognised as a loss.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

STEPS, SOLVER_STEPS = 2, 20  # Gauss-Newton steps, and steps of conjugate gradients in each
STIFFNESS = 1e-3  # of the displacement in voxels, for intensities in [0, 1]
BLUR = 0.8  # voxels, standard deviation of the Gaussian that smooths both images first
MARGIN = 5  # voxels around the structures that take part in the registration
TRIMMED = 0.8  # share of the voxels that the intensities are matched by
TINY = 1e-30  # keeps 0 / 0 of equal images at 0


@torch.no_grad()
def measure_growth(before: Tensor, after: Tensor, fractions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The volume of each structure in the images after, divided by that before, (B,) each; NaN where it is absent.

    Args:
        before, after: images (B, 1, X, Y, Z) in [0, 1].
        fractions: by structure the fraction of each voxel of the images before that it fills, (B, X, Y, Z).
    """
    if not fractions:
        return {}
    after = _match_intensities(after, before)
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
    fixed, moving = _smooth(fixed), _smooth(moving)
    own_gradient = _gradient(fixed)
    displacement = torch.zeros_like(own_gradient)
    for _ in range(STEPS):
        warped = _warp(moving, displacement)
        gradient = (_gradient(warped) + own_gradient) / 2
        force = gradient * (fixed - warped) + STIFFNESS * _laplacian(displacement)
        displacement = displacement + _solve(gradient, force)
    return displacement


def _match_intensities(images: Tensor, targets: Tensor) -> Tensor:
    """Each image times a factor plus an offset, closest to its target: brightness and contrast are no growth.

    A least-squares fit that leaves out the voxels of the largest residuals, where structures grow (trimmed twice).
    """
    x, target = images.flatten(1), targets.flatten(1)
    kept, matched = torch.ones_like(x), x
    for _ in range(3):
        total = kept.sum(1, keepdim=True)
        mean, wanted = ((kept * part).sum(1, keepdim=True) / total for part in (x, target))
        centred = x - mean
        variance = (kept * centred.square()).sum(1, keepdim=True) + TINY
        matched = (kept * centred * (target - wanted)).sum(1, keepdim=True) / variance * centred + wanted
        residual = (matched - target).abs()
        most = max(int(TRIMMED * x.shape[1]), 1)
        kept = (residual <= residual.kthvalue(most, dim=1, keepdim=True).values).float()
    return matched.view_as(images)


def _solve(gradient: Tensor, force: Tensor) -> Tensor:
    """The update d, (B, 3, X, Y, Z), with gradient (gradient . d) - STIFFNESS laplacian(d) = force."""

    def inner(first: Tensor, second: Tensor) -> Tensor:
        return (first * second).sum((1, 2, 3, 4), keepdim=True)

    update, rest, search = torch.zeros_like(force), force, force
    squared = inner(rest, rest)
    for _ in range(SOLVER_STEPS):
        product = gradient * (gradient * search).sum(1, keepdim=True) - STIFFNESS * _laplacian(search)
        step = squared / (inner(search, product) + TINY)
        update, rest = update + step * search, rest - step * product
        before, squared = squared, inner(rest, rest)
        search = rest + squared / (before + TINY) * search
    return update


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


def _laplacian(field: Tensor) -> Tensor:
    """Sum of the six neighbours minus six times the voxel, of a field (B, 3, X, Y, Z) that continues at its faces."""
    padded = F.pad(field, (1,) * 6, mode="replicate")
    total = -6 * field
    for axis, size in zip((2, 3, 4), field.shape[2:], strict=True):
        inside = [slice(None), slice(None), *(slice(1, -1),) * 3]
        for start in (0, 2):
            inside[axis] = slice(start, start + size)
            total = total + padded[tuple(inside)]
    return total


def _smooth(image: Tensor) -> Tensor:
    """An image (B, 1, X, Y, Z) convolved with a Gaussian along each axis."""
    radius = round(3 * BLUR)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=image.device) / BLUR) ** 2)
    kernel = kernel / kernel.sum()
    for axis in range(3):
        shape, padding = [1] * 5, [0] * 6
        shape[2 + axis] = -1
        padding[2 * (2 - axis)] = padding[2 * (2 - axis) + 1] = radius
        image = F.conv3d(F.pad(image, padding, mode="replicate"), kernel.view(shape))
    return image


def _bounding_box(fractions: Sequence[Tensor]) -> tuple[slice, ...]:
    """The part (x, y, z) of the volume that contains all structures of all images, and a margin around them."""
    present = torch.stack([part.amax(0) > 0 for part in fractions]).any(0)  # (X, Y, Z)
    box = []
    for axis, size in enumerate(present.shape):
        found = present.movedim(axis, 0).flatten(1).any(1).nonzero()
        low, high = (int(found[0]), int(found[-1])) if len(found) else (0, size - 1)
        box.append(slice(max(low - MARGIN, 0), min(high + MARGIN + 1, size)))
    return tuple(box)
