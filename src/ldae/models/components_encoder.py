"""The components encoder: y starts as the principal components of the training scans, and a residual may be learned.

    y = sqrt(1 - s) R_1 c (x - mean) V + sqrt(s) R_2 r(x)

V: the principal components (Pearson 1901) of the training scans' views, c one scale for all of them, [R_1 R_2] the
columns of an orthonormal matrix, r a network whose share of y's mean square is at most s (`residual_share`).

Why not learn everything: on 149 real scans, y from components tells age and sex better than every encoder that was
trained from random weights, and a scan is decoded from it as well.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ldae.models.blocks import full_precision
from ldae.models.rotation import spreading_rotation
from ldae.utils.errors import UserError

COMPONENTS, RESIDUAL, BOTH = "components", "residual", "both"  # the parts of y, see ComponentsEncoder.parts


class ComponentsEncoder(nn.Module):
    """Views of scans (B, C, X, Y, Z) in [0, 1] -> y (B, dim).

    The components keep their sizes relative to each other: dividing each by its own standard deviation would make noise
    of the last ones as large as the first. The rotation gives every feature the same variance without that, for
    whatever treats the features of y alike. There is no LayerNorm, which would make the length of y meaningless.

    The components are not trained. They are stored with the weights in 16 bits, which changes a score by less than
    1e-3 of its standard deviation.

    The residual's numbers r, (B, m), enter as r / sqrt(1 + mean(r^2)), scan by scan: small ones are hardly changed, and
    their mean square cannot exceed 1. So neither the batch nor running statistics matter, and the share of the
    residual in y's mean square stays below `residual_share` whatever is learned. It has features of its own, which are
    perpendicular to those of the components, so that `parts` can tell the two apart in y.

    Args:
        shape: (C, X, Y, Z) of a view.
        components: how many there are, at most one less than there are training scans; further ones are 0.
        dim: width of y.
        spacing: voxel size of the view in mm, one number or one for each axis. None: unknown, `resolution` is ignored.
        resolution: components are those of the view averaged over blocks of whole voxels of at most this many mm.
            Finer views hold no more of what components can tell, but more memory.
        residual: network (B, C, X, Y, Z) -> (B, m) that is learned beside the components and has the attribute `dim`,
            which is m <= dim - components. None: the components alone.
        residual_share: s, the largest share of the residual in the mean square of y.

    Raises:
        UserError: arguments do not fit together.
    """

    def __init__(
        self,
        shape: Sequence[int],
        components: int = 64,
        dim: int = 768,
        spacing: float | Sequence[float] | None = None,
        resolution: float = 4.5,
        residual: nn.Module | None = None,
        residual_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.shape = tuple(int(size) for size in shape)
        self.count, self.dim, self.residual_share = components, dim, residual_share
        width = 0 if residual is None else int(residual.dim)
        _check_sizes(self.shape, components, dim, residual_share, width)
        self.blocks = _block_sizes(spacing, resolution)
        grid = (self.shape[0], *(-(-size // block) for size, block in zip(self.shape[1:], self.blocks, strict=True)))
        self.residual = residual
        self.register_buffer("mean", torch.zeros(grid))
        # Times the square root of the number of voxels, because 16 bits are exact for numbers of about 1.
        self.register_buffer("components", torch.zeros(components, *grid, dtype=torch.float16))
        self.register_buffer("scale", torch.ones(()))
        # On the CPU even if the network is built on the meta device, because no file of weights contains it.
        self.register_buffer("rotation", spreading_rotation(dim, components + width), persistent=False)

    fitted = ("mean", "components", "scale")  # buffers that are measured before training, see models/fitted.py

    @property
    def random_start(self) -> bool:
        """Whether y before training depends on random numbers."""
        return self.residual is not None and getattr(self.residual, "random_start", True)

    @property
    def checkpointing(self) -> bool:
        """Whether the residual recomputes its activations in the backward pass."""
        return self.residual is not None and self.residual.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        if self.residual is not None:
            self.residual.checkpointing = value

    @torch.no_grad()
    def set_components(self, mean: Tensor, directions: Tensor, variances: Tensor) -> None:
        """Store the principal components of the training scans.

        Args:
            mean: (C, X', Y', Z') of the scans as `pool` returns them.
            directions: (components, C, X', Y', Z'), orthonormal.
            variances: (components,), the mean squares of the training scans' scores.
        """
        self.mean.copy_(mean)
        self.components.copy_(directions * math.sqrt(self.mean.numel()))
        self.scale.copy_((self.dim / variances.sum().clamp(min=1e-12)).sqrt())

    def make_trainable(self) -> None:
        """Turn mean and components into parameters of 32 bits, for a supervised network, which trains all."""
        for name in ("mean", "components"):
            value = getattr(self, name).float()
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(value))

    def pool(self, x: Tensor) -> Tensor:
        """Averages over blocks of voxels, of which there are components: (B, C, X, Y, Z) -> (B, C, X', Y', Z').

        Raises:
            UserError: the views have another shape than the encoder was built for.
        """
        if x.ndim != 5 or tuple(x.shape[1:]) != self.shape:
            raise UserError(
                f"views of shape {tuple(x.shape[1:])} do not have the shape {self.shape}, for which the encoder was "
                "built (channels, X, Y, Z)"
            )
        if self.blocks == (1, 1, 1):
            return x.float()
        return functional.avg_pool3d(x.float(), self.blocks, ceil_mode=True, count_include_pad=False)

    def scores(self, x: Tensor) -> Tensor:
        """Scores of the components, (B, components), whose squares add up to `dim` on average over training scans."""
        with full_precision(x):
            difference = (self.pool(x) - self.mean).flatten(1)
            projected = difference @ self.components.float().flatten(1).T
            return projected * (self.scale / math.sqrt(self.mean.numel()))

    def forward(self, x: Tensor) -> Tensor:
        """Views (B, C, X, Y, Z) -> y (B, dim).

        Raises:
            UserError: see `pool`.
        """
        first, second = self.rotation[:, : self.count], self.rotation[:, self.count :]
        scores = self.scores(x)
        if self.residual is None:
            with full_precision(x):
                return scores @ first.T
        residual = self.residual(x)
        with full_precision(x):
            residual = residual.float()
            residual = residual * torch.rsqrt(1 + residual.square().mean(dim=1, keepdim=True))
            share = self.residual_share
            scores, residual = math.sqrt(1 - share) * scores, math.sqrt(share * self.dim / second.shape[1]) * residual
            return scores @ first.T + residual @ second.T

    def parts(self, y: Tensor) -> Mapping[str, Tensor]:
        """What y owes to each part: y (B, dim) as `components`, `residual` and `both` (y itself), each (B, dim).

        Without a residual there are only `components`.
        """
        if self.residual is None:
            return {COMPONENTS: y}
        with full_precision(y):
            y = y.float()
            first, second = self.rotation[:, : self.count], self.rotation[:, self.count :]
            return {COMPONENTS: y @ first @ first.T, RESIDUAL: y @ second @ second.T, BOTH: y}

    def attention(self, x: Tensor) -> Tensor:
        """Refuse: this encoder weighs no slices.

        Raises:
            UserError: always.
        """
        raise UserError("the components encoder has no attention: it reads all voxels with fixed weights")


def _block_sizes(spacing: float | Sequence[float] | None, resolution: float) -> tuple[int, int, int]:
    """Voxels along each axis that are averaged: as many whole ones as fit into `resolution` mm, at least one."""
    if spacing is None:
        return (1, 1, 1)
    sizes = [spacing] * 3 if isinstance(spacing, int | float) else list(spacing)
    x, y, z = (max(1, math.floor(resolution / size + 1e-6)) for size in sizes)
    return x, y, z


def _check_sizes(shape: tuple[int, ...], components: int, dim: int, share: float, width: int) -> None:
    """Refuse arguments of ComponentsEncoder that do not fit together."""
    if len(shape) != 4 or min(shape) < 1:
        raise UserError(f"model.encoder.shape={list(shape)}: four numbers are needed, channels, X, Y and Z")
    if not 1 <= components <= dim:
        raise UserError(f"model.encoder.components={components} must be between 1 and model.encoder.dim={dim}")
    if not 0 <= share < 1:
        raise UserError(f"model.encoder.residual_share={share} must be at least 0 and below 1")
    if width > dim - components:
        raise UserError(
            f"model.encoder.residual.dim={width} is more than the {dim - components} features of y that "
            f"{components} components leave of {dim}: choose a smaller one"
        )
    if (width > 0) != (share > 0):
        raise UserError(
            f"model.encoder.residual_share={share} needs {'a value above 0' if width else 'model.encoder.residual'}"
        )
