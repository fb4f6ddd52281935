"""A batch of scans that is compressed, embedded and inverted, ready to be edited."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldae.diffusion.code import Code
from ldae.editing.editor import Editor
from ldae.evaluation.context import Context
from ldae.evaluation.edits.anatomy import Anatomy, Levels


@dataclass(frozen=True)
class InvertedScans:
    """B scans and what their edits are compared with.

    Attributes:
        rows: their row numbers.
        z: latents, (B, C, X', Y', Z').
        y: embeddings, (B, dim).
        reconstruction: of the autoencoder, (B, 1, X, Y, Z).
        mask: the brain, bool, of that shape.
        code: of the inversion.
        levels: intensity levels by structure of each reconstruction.
    """

    rows: list[int]
    z: Tensor
    y: Tensor
    reconstruction: Tensor
    mask: Tensor
    code: Code
    levels: list[dict[str, Levels]]


@torch.no_grad()
def invert_scans(context: Context, editor: Editor, anatomy: Anatomy, rows: Sequence[int]) -> InvertedScans:
    """Compress, embed and invert the scans of these rows."""
    model, rows = context.model, [int(row) for row in rows]
    z, y = model.compress(context.volumes(rows).to(model.device)), context.y(rows)
    reconstruction = model.decompress(z)
    code = editor.invert(model, z, y, context.seed, rows)
    mask, levels = anatomy.brains(reconstruction, rows), anatomy.levels(rows, reconstruction)
    return InvertedScans(rows, z, y, reconstruction, mask, code, levels)
