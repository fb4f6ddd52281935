"""What every edit shares: how deep a scan is inverted, and how the anatomy of what comes out is measured."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ldae.diffusion.code import Code
from ldae.diffusion.guidance import Guidance
from ldae.utils.seeding import draw_normal


class Editor:
    """The settings of an edit. Full inversion writes most of the scan into z_T, which then resists any change of y.

    Args:
        steps: of inversion and of decoding; None: the sampler's.
        depth: invert up to t = depth (T - 1); less keeps more of the scan.
        renoise: share of the inversion's steps replaced by noise (arXiv 2410.23530); more lets go of more.
        strength: of guidance, for inversion and decoding alike; None: the sampler's.
    """

    def __init__(
        self, steps: int | None = None, depth: float = 0.7, renoise: float = 0.0, strength: float | None = None
    ) -> None:
        self.steps, self.depth, self.renoise, self.strength = steps, depth, renoise, strength

    def tuned(self, model: Any) -> Any:
        """The model with this guidance strength; the model handed in stays as it is."""
        if self.strength is None:
            return model
        tuned = copy.copy(model)
        own = model.sampler.guidance
        tuned.sampler = replace(model.sampler, guidance=Guidance(own.form, self.strength, own.stop))
        return tuned

    def invert(self, model: Any, z: Tensor, y: Tensor, seed: int, keys: Sequence[int]) -> Code:
        """The codes of latents z (B, C, ...) given y (B, dim); scan i's noise depends on (seed, keys[i])."""
        noise = draw_normal(z.shape[1:], seed, keys, "edit").to(z) if self.renoise else None
        return self.tuned(model).invert(z, y, self.steps, depth=self.depth, noise=noise, renoise=self.renoise)

    def decode(self, model: Any, code: Code | Tensor, y: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z) of codes, or of noise, given y."""
        return self.tuned(model).decode(code, y, self.steps)
