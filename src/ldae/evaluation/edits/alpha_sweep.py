"""A batch of scans edited along a direction at several values of alpha, and what can be measured on the results."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldae.editing.direction import Direction
from ldae.editing.editor import Editor
from ldae.evaluation.context import Context
from ldae.evaluation.edits.anatomy import Anatomy
from ldae.evaluation.edits.edited_scans import embed_edited_scans
from ldae.evaluation.edits.inverted_scans import InvertedScans
from ldae.evaluation.images.image_metrics import ssim, to_arrays


@dataclass(frozen=True)
class AlphaSweep:
    """Edits of B scans at A values of alpha, 0 among them.

    Attributes:
        images: (A, B, 1, X, Y, Z).
        volumes: mm3 by structure, (B, A) each; see anatomy.py.
        identity: SSIM to alpha = 0 in the brain, (B, A).
    """

    alphas: list[float]
    scans: InvertedScans
    images: Tensor
    volumes: dict[str, np.ndarray]
    identity: np.ndarray

    def images_at(self, alpha: float) -> Tensor:
        """The images at one alpha, (B, 1, X, Y, Z)."""
        return self.images[self.alphas.index(alpha)]

    def difference_at(self, alpha: float) -> np.ndarray:
        """The images at one alpha minus those at 0, (B, X, Y, Z)."""
        return to_arrays(self.images_at(alpha) - self.images_at(0.0))

    def volume_change(self, name: str, alpha: float) -> np.ndarray:
        """Volume of a structure at one alpha minus that at 0, (B,) mm3."""
        return self.volumes[name][:, self.alphas.index(alpha)] - self.volumes[name][:, self.alphas.index(0.0)]

    @property
    def brain(self) -> np.ndarray:
        """(B, X, Y, Z) bool."""
        return self.scans.mask[:, 0].cpu().numpy()


@torch.no_grad()
def run_sweep(
    context: Context,
    editor: Editor,
    anatomy: Anatomy,
    direction: Direction,
    scans: InvertedScans,
    alphas: Sequence[float],
    register: bool = False,
) -> AlphaSweep:
    """Decode the scans at every alpha, 0 among them, and measure the results.

    Args:
        register: also measure the structures that need a registration of every image to that at alpha = 0.
    """
    alphas = [float(alpha) for alpha in alphas]
    decoded = [editor.decode(context.model, scans.code, direction.edit(scans.y, alpha)) for alpha in alphas]
    images = torch.stack(decoded)
    unedited = images[alphas.index(0.0)]
    identity = torch.stack([ssim(image, unedited, scans.mask) for image in images], 1).double().cpu().numpy()
    measured = [anatomy.volumes(image, scans.levels) for image in images]
    volumes = {name: np.stack([values[name] for values in measured], 1) for name in anatomy.measures}
    if register:
        grown = [anatomy.grown_volumes(scans.rows, unedited, image) for image in images]
        volumes |= {name: np.stack([values[name] for values in grown], 1) for name in anatomy.registered}
    return AlphaSweep(alphas, scans, images, volumes, identity)


def share_outside(change: np.ndarray, brain: np.ndarray, region: np.ndarray) -> np.ndarray:
    """Share of the absolute change inside the brain that is outside `region`, (B,); NaN without any change.

    Args:
        change, brain: (B, X, Y, Z).
        region: (X, Y, Z) bool.
    """
    inside_brain = np.abs(change) * brain
    total = inside_brain.sum((1, 2, 3))
    outside = (inside_brain * ~region).sum((1, 2, 3))
    return np.divide(outside, total, out=np.full(len(total), np.nan), where=total > 0)


@torch.no_grad()
def measure_reversibility(
    context: Context, editor: Editor, direction: Direction, sweep: AlphaSweep, alpha: float
) -> np.ndarray:
    """SSIM in the brain to alpha = 0 once the edited scans are treated as real scans and edited by -alpha, (B,)."""
    model, edited = context.model, sweep.images_at(alpha)
    y = embed_edited_scans(context, sweep.scans.rows, edited, sweep.images_at(0.0))
    code = editor.invert(model, model.compress(edited), y, context.seed, sweep.scans.rows)
    back = editor.decode(model, code, direction.edit(y, -alpha))
    return ssim(back, sweep.images_at(0.0), sweep.scans.mask).double().cpu().numpy()
