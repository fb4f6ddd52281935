"""A batch of scans compressed, embedded and inverted, ready to be edited, with what their edits are measured against."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ldae.diffusion.code import Code
from ldae.editing.editor import Editor
from ldae.evaluation.context import Context
from ldae.evaluation.edits.anatomy import Anatomy, Levels


def embeddings_of(context: Context, rows: Sequence[int]) -> Tensor:
    """y (B, dim) of these rows on the model's device."""
    return torch.from_numpy(np.asarray(context.embeddings[list(rows)], np.float32)).to(context.model.device)


@dataclass(frozen=True)
class InvertedScans:
    """A batch of scans ready to be edited. z: latents; y: (B, dim); levels: from the autoencoder's reconstruction.

    reconstruction: (B, 1, X, Y, Z); mask: the brain, bool of that shape; code: of the inversion.
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
    z, y = model.compress(context.volumes(rows).to(model.device)), embeddings_of(context, rows)
    reconstruction = model.decompress(z)
    code = editor.invert(model, z, y, context.seed, rows)
    mask, levels = anatomy.brains(reconstruction, rows), anatomy.levels(rows, reconstruction)
    return InvertedScans(rows, z, y, reconstruction, mask, code, levels)
