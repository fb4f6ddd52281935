"""Code: what an inversion leaves, z_T and what an exact scheme carries with it, and the edits defined on it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldae.diffusion.slerp import slerp
from ldae.errors import UserError


@dataclass(frozen=True)
class Code:
    """The stochastic code of a batch of latents.

    Attributes:
        z: (B, C, X, Y, Z), the latent at noise level `depth`: z_T for 1.
        carried: the second tensor of an exact scheme, of the shape of z: a small correction which is zero for
            fresh noise; None for one-tensor schemes. Edits without meaning for it drop it: the decoding is then that
            of a new sample, right up to discretisation error.
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
        """Another z at this depth; the correction belonged to the old one and is dropped."""
        return replace(self, z=z, carried=None)

    def slerp(self, other: "Code", t: float | Tensor) -> "Code":
        """Spherical interpolation of z, straight of the (small) correction; t in [0, 1], a number or (B,).

        Raises:
            UserError: the codes end at different depths.
        """
        if self.depth != other.depth:
            raise UserError(f"codes of depth {self.depth} and {other.depth} cannot be interpolated; invert both alike")
        z = slerp(self.z, other.z, t)
        if self.carried is None or other.carried is None:
            return self.replace(z)
        share = torch.as_tensor(t, dtype=z.dtype, device=z.device).expand(len(z)).view(-1, *[1] * (z.ndim - 1))
        return replace(self, z=z, carried=torch.lerp(self.carried, other.carried, share))

    def mix(self, noise: Tensor, share: float) -> "Code":
        """sqrt(1 - share) z + sqrt(share) noise, which keeps unit variance; share = 1 forgets the scan's own noise."""
        if share == 0:
            return self
        return self.replace((1 - share) ** 0.5 * self.z + share**0.5 * noise)

    def strip(self) -> "Code":
        """Without the correction: z alone, as a fresh noise would be decoded."""
        return self.replace(self.z)


def as_code(code: Code | Tensor) -> Code:
    """Noise (B, ...) as a full-depth code; a Code as it is."""
    return code if isinstance(code, Code) else Code(code)


def concatenate(codes: list[Code]) -> Code:
    """One batch of several.

    Raises:
        UserError: their depths differ, or only some carry a correction.
    """
    depths = {code.depth for code in codes}
    carrying = {code.carried is not None for code in codes}
    if len(depths) != 1 or len(carrying) != 1:
        raise UserError("codes of different depths or samplers cannot be joined; invert them alike")
    carried = torch.cat([code.carried for code in codes]) if carrying.pop() else None
    return Code(torch.cat([code.z for code in codes]), carried, depths.pop())
