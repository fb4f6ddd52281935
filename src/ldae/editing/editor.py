"""How a scan is inverted and decoded when its y is edited."""

from collections.abc import Sequence
from typing import Protocol, TypedDict

from torch import Tensor

from ldae.diffusion.code import Code
from ldae.utils.seeding import draw_normal


class EditableModel(Protocol):
    """The two methods of `LDAE` that an edit needs."""

    def invert(
        self,
        z: Tensor,
        y: Tensor,
        steps: int | None = None,
        *,
        strength: float | None = None,
        depth: float = 1.0,
        noise: Tensor | None = None,
        renoise: float = 0.0,
    ) -> Code:
        """The code of latents z given y."""
        ...

    def decode(
        self, code: Code | Tensor, y: Tensor, steps: int | None = None, *, strength: float | None = None
    ) -> Tensor:
        """Volumes of a code, or of noise, given y."""
        ...


class EditSettings(TypedDict, total=False):
    """The arguments of `Editor`; None keeps the model's own."""

    steps: int | None
    depth: float | None
    renoise: float | None
    strength: float | None


class Editor:
    """Inverts latents and decodes them with another y.

    Full inversion writes most of the scan into z_T, which then resists any change of y. A smaller `depth` or a larger
    `renoise` leaves more of the scan to y, at the price of detail.

    Args:
        steps: number of steps of the inversion and of decoding; None: the sampler's.
        depth: invert up to t = depth (T - 1).
        renoise: share of the inversion's steps, from t = 0 on, that are replaced by adding noise (arXiv 2410.23530).
        strength: of guidance, for both inversion and decoding; None: the sampler's.
    """

    def __init__(
        self, steps: int | None = None, depth: float = 0.7, renoise: float = 0.0, strength: float | None = None
    ) -> None:
        self.steps, self.depth, self.renoise, self.strength = steps, depth, renoise, strength

    def with_settings(
        self,
        steps: int | None = None,
        depth: float | None = None,
        renoise: float | None = None,
        strength: float | None = None,
    ) -> "Editor":
        """An editor with these settings, where they are given, instead of its own."""
        changes = {"steps": steps, "depth": depth, "renoise": renoise, "strength": strength}
        return Editor(**{**vars(self), **{name: value for name, value in changes.items() if value is not None}})

    def invert(self, model: EditableModel, z: Tensor, y: Tensor, seed: int, keys: Sequence[int]) -> Code:
        """The codes of latents z (B, C, ...) given y (B, dim); the noise of scan i depends on (seed, keys[i]) only."""
        noise = draw_normal(z.shape[1:], seed, keys, "edit").to(z) if self.renoise else None
        return model.invert(
            z, y, self.steps, strength=self.strength, depth=self.depth, noise=noise, renoise=self.renoise
        )

    def decode(self, model: EditableModel, code: Code | Tensor, y: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z) of codes, or of noise, given y (B, dim)."""
        return model.decode(code, y, self.steps, strength=self.strength)
