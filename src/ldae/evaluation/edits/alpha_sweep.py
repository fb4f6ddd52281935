"""A batch of scans walked along a direction: images at a ladder of alpha, and what can be measured on them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldae.editing.directions import Direction
from ldae.editing.editor import Editor
from ldae.evaluation.context import Context
from ldae.evaluation.edits.anatomy import Anatomy
from ldae.evaluation.edits.inverted_scans import InvertedScans
from ldae.evaluation.images.image_metrics import ssim, to_arrays


@dataclass(frozen=True)
class AlphaSweep:
    """Edits of B scans at A values of alpha.

    Attributes:
        images: (A, B, 1, X, Y, Z).
        volumes: mm3 by structure, (B, A) each.
        identity: SSIM in the brain to alpha = 0, (B, A).
    """

    alphas: list[float]
    opened: InvertedScans
    images: Tensor
    volumes: dict[str, np.ndarray]
    identity: np.ndarray

    def at(self, alpha: float) -> Tensor:
        """(B, 1, X, Y, Z)."""
        return self.images[self.alphas.index(alpha)]

    def change(self, alpha: float) -> np.ndarray:
        """Difference of the images at `alpha` from those at 0, (B, X, Y, Z)."""
        return to_arrays(self.at(alpha) - self.at(0.0))

    def volume_change(self, name: str, alpha: float) -> np.ndarray:
        """(B,) mm3 against alpha = 0."""
        return self.volumes[name][:, self.alphas.index(alpha)] - self.volumes[name][:, self.alphas.index(0.0)]

    @property
    def brain(self) -> np.ndarray:
        """(B, X, Y, Z) bool."""
        return self.opened.mask[:, 0].cpu().numpy()


@torch.no_grad()
def run_sweep(
    context: Context,
    editor: Editor,
    anatomy: Anatomy,
    direction: Direction,
    opened: InvertedScans,
    alphas: Sequence[float],
) -> AlphaSweep:
    """Decode at every alpha, 0 among them, and measure."""
    alphas = [float(alpha) for alpha in alphas]
    decoded = [editor.decode(context.model, opened.code, direction.edit(opened.y, alpha)) for alpha in alphas]
    images = torch.stack(decoded)
    middle = images[alphas.index(0.0)]
    identity = torch.stack([ssim(image, middle, opened.mask) for image in images], 1).double().cpu().numpy()
    measured = [anatomy.volumes(image, opened.levels) for image in images]
    volumes = {name: np.stack([values[name] for values in measured], 1) for name in anatomy.measures}
    return AlphaSweep(alphas, opened, images, volumes, identity)


def share_outside(change: np.ndarray, brain: np.ndarray, region: np.ndarray) -> np.ndarray:
    """(B,) part of the absolute change (B, X, Y, Z) inside the brains that lies outside `region` (X, Y, Z)."""
    inside_brain = np.abs(change) * brain
    total = inside_brain.sum((1, 2, 3))
    elsewhere = (inside_brain * ~region).sum((1, 2, 3))
    return np.divide(elsewhere, total, out=np.full(len(total), np.nan), where=total > 0)


@torch.no_grad()
def measure_reversibility(
    context: Context, editor: Editor, direction: Direction, ladder: AlphaSweep, alpha: float
) -> np.ndarray:
    """There and back, (B,): the edited scans, taken as if they were real, edited by -alpha; SSIM in the brain."""
    model, edited = context.model, ladder.at(alpha)
    y = model.embed(edited)
    code = editor.invert(model, model.compress(edited), y, context.seed, ladder.opened.rows)
    back = editor.decode(model, code, direction.edit(y, -alpha))
    return ssim(back, ladder.at(0.0), ladder.opened.mask).double().cpu().numpy()
