"""What one does with a trained model, made of its primitives: reconstruct, vary, interpolate, edit."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ldae.editing.editor import Editor
from ldae.inputs import Scans


class Edit(Protocol):
    """Anything that moves y, as evaluation.directions.Direction does."""

    def edit(self, y: Tensor, alpha: float) -> Tensor:
        """y' of y (B, dim)."""
        ...


class Uses:
    """Methods of pipeline.LDAE, which has the primitives that these are made of."""

    def reconstruct(self, x: Scans, steps: int | None = None, **options: Any) -> Tensor:
        """The scan decoded from its own code and y; `options` of the inversion as in `invert`. From y alone: `vary`."""
        x = self.volumes(x)
        y = self.embed(x)
        return self.decode(self.invert(self.compress(x), y, steps, **options), y, steps)

    def interpolate(self, xa: Scans, xb: Scans, t: float | Tensor, steps: int | None = None) -> Tensor:
        """Between two scans: y on the line, z_T on the arc; t in [0, 1]."""
        return next(self.between(xa, xb, [t], steps))

    def between(
        self, xa: Scans, xb: Scans, places: Sequence[float | Tensor], steps: int | None = None
    ) -> Iterator[Tensor]:
        """`interpolate` at one place after another, the scans inverted only once."""
        xa, xb = self.volumes(xa), self.volumes(xb)
        ya, yb = self.embed(xa), self.embed(xb)
        first = self.invert(self.compress(xa), ya, steps)
        second = self.invert(self.compress(xb), yb, steps)
        for t in places:
            share = torch.as_tensor(t, dtype=ya.dtype, device=self.device).view(-1, 1)
            yield self.decode(first.slerp(second, t), torch.lerp(ya, yb, share.expand_as(ya)), steps)

    def vary(self, x: Scans, count: int, seed: int = 0, steps: int | None = None) -> Tensor:
        """One scan's y with `count` codes ~ N(0, I): (count, 1, X, Y, Z) from x (1, 1, X, Y, Z)."""
        return self.decode(self.noise(count, seed), self.embed(x).expand(count, -1), steps)

    def manipulate(self, x: Scans, direction: str | Edit, alpha: float, **settings: Any) -> Tensor:
        """The scan with y moved along a direction, decoded from its own code.

        Args:
            direction: the name of a direction or probe, or anything with `edit(y, alpha)`.
            alpha: 1 is a step as long as a typical standardised y, sqrt(dim) along the unit direction.
            settings: steps, depth, renoise, strength as in evaluation.editing.Editor, instead of those that the
                model's evaluation chose.
        """
        return next(self.ladder(x, direction, [alpha], **settings))

    def ladder(
        self, x: Scans, direction: str | Edit, alphas: Sequence[float], seed: int = 0, **settings: Any
    ) -> Iterator[Tensor]:
        """`manipulate` at one alpha after another, the scans inverted only once."""
        chosen = self.direction(direction) if isinstance(direction, str) else direction
        editor = Editor(**{**vars(self.knowledge.editor), **settings})
        x = self.volumes(x)
        y = self.embed(x)
        code = editor.invert(self, self.compress(x), y, seed, range(len(y)))
        for alpha in alphas:
            yield editor.decode(self, code, chosen.edit(y, alpha))
