"""Code: the result of inverting a latent, z_T and the second latent of an exact scheme; interpolation of codes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldae.diffusion.slerp import slerp_weights
from ldae.utils.errors import UserError


@dataclass(frozen=True)
class Code:
    """The stochastic code of a batch of latents.

    Attributes:
        z: latent at the noise level given by `depth`, (B, C, X, Y, Z); z_T for depth 1.
        neighbour: latent one node before z, needed by an exact scheme (exact.py), of the shape of z. None for other
            schemes and for fresh noise: decoding is then correct up to discretisation error.
        depth: share of the schedule that the inversion covered; sampling starts there.
    """

    z: Tensor
    neighbour: Tensor | None = None
    depth: float = 1.0

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, index: slice | Tensor | list[int]) -> "Code":
        """The code of some samples of the batch."""
        return replace(self, z=self.z[index], neighbour=None if self.neighbour is None else self.neighbour[index])

    def to(self, device: torch.device | str) -> "Code":
        """The same code on another device."""
        neighbour = None if self.neighbour is None else self.neighbour.to(device)
        return replace(self, z=self.z.to(device), neighbour=neighbour)

    def slerp(self, other: "Code", t: float | Tensor) -> "Code":
        """Spherical interpolation; t in [0, 1], a number or (B,); 0 gives this code, 1 the other.

        The neighbours are interpolated with the weights of z; if either code has none, neither has the result.

        Raises:
            UserError: the codes have different depths.
        """
        if self.depth != other.depth:
            raise UserError(f"codes of depth {self.depth} and {other.depth} cannot be interpolated; invert both alike")
        weight_a, weight_b = slerp_weights(self.z, other.z, t)

        def between(a: Tensor, b: Tensor) -> Tensor:
            return (weight_a * a + weight_b * b).to(a.dtype)

        neighbour = None
        if self.neighbour is not None and other.neighbour is not None:
            neighbour = between(self.neighbour, other.neighbour)
        return replace(self, z=between(self.z, other.z), neighbour=neighbour)


def as_code(code: Code | Tensor) -> Code:
    """A code as it is; noise (B, ...) as a code of full depth."""
    return code if isinstance(code, Code) else Code(code)
