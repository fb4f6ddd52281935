"""Code: what an inversion leaves, z_T and what an exact scheme carries with it, and the edits defined on it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldae.diffusion.slerp import slerp_weights
from ldae.utils.errors import UserError


@dataclass(frozen=True)
class Code:
    """The stochastic code of a batch of latents.

    Attributes:
        z: (B, C, X, Y, Z), the latent at noise level `depth`: z_T for 1.
        carried: the second tensor of an exact scheme (exact.py: the latent one node before z), of the shape of z; None
            for one-tensor schemes and fresh noise. Edits that have no meaning for it drop it: decoding then starts as
            from fresh noise, right up to discretisation error.
        depth: share of the schedule that the inversion walked; sampling starts there.
    """

    z: Tensor
    carried: Tensor | None = None
    depth: float = 1.0

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, index: slice | Tensor | list[int]) -> "Code":
        """Some samples of the batch."""
        return replace(self, z=self.z[index], carried=None if self.carried is None else self.carried[index])

    def to(self, device: torch.device | str) -> "Code":
        """On another device."""
        return replace(self, z=self.z.to(device), carried=None if self.carried is None else self.carried.to(device))

    def replace(self, z: Tensor) -> "Code":
        """Another z at this depth; what was carried belonged to the old one and is dropped."""
        return replace(self, z=z, carried=None)

    def slerp(self, other: "Code", t: float | Tensor) -> "Code":
        """Spherical interpolation; t in [0, 1], a number or (B,). What is carried gets the same weights as z.

        Raises:
            UserError: the codes end at different depths.
        """
        if self.depth != other.depth:
            raise UserError(f"codes of depth {self.depth} and {other.depth} cannot be interpolated; invert both alike")
        weight_a, weight_b = slerp_weights(self.z, other.z, t)

        def between(a: Tensor, b: Tensor) -> Tensor:
            return (weight_a * a + weight_b * b).to(a.dtype)

        z = between(self.z, other.z)
        if self.carried is None or other.carried is None:
            return self.replace(z)
        return replace(self, z=z, carried=between(self.carried, other.carried))

    def mix(self, noise: Tensor, share: float) -> "Code":
        """sqrt(1 - share) z + sqrt(share) noise, which keeps unit variance; share = 1 forgets the scan's own noise."""
        if share == 0:
            return self
        return self.replace((1 - share) ** 0.5 * self.z + share**0.5 * noise)

    def strip(self) -> "Code":
        """z alone, decoded as fresh noise would be."""
        return self.replace(self.z)


def as_code(code: Code | Tensor) -> Code:
    """Noise (B, ...) as a full-depth code; a Code as it is."""
    return code if isinstance(code, Code) else Code(code)


def concatenate(codes: list[Code]) -> Code:
    """One batch of several.

    Raises:
        UserError: their depths differ, or only some carry a second tensor.
    """
    depths = {code.depth for code in codes}
    carrying = {code.carried is not None for code in codes}
    if len(depths) != 1 or len(carrying) != 1:
        raise UserError("codes of different depths or samplers cannot be joined; invert them alike")
    carried = torch.cat([code.carried for code in codes]) if carrying.pop() else None
    return Code(torch.cat([code.z for code in codes]), carried, depths.pop())
