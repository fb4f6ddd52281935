"""The semantic vectors of edited scans, as whoever opens the result of `ldae manipulate` would compute them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldae.evaluation.context import Context


@torch.no_grad()
def embed_edited_scans(context: Context, rows: Sequence[int], edited: Tensor, unedited: Tensor) -> Tensor:
    """y of scans with the change between two decoded images added, (B, dim).

    A decoded image has larger voxels than the scan, and less detail. Tissue maps that are made of it differ from those
    of the scan for this reason alone, by more than an edit changes them.

    Args:
        rows: of the scans.
        edited, unedited: decoded images, (B, 1, X, Y, Z). Where only volumes are at hand, `edited` itself is embedded.
    """
    if context.open_scan is None:
        return context.model.embed(edited)
    found = []
    for row, after, before in zip(rows, edited, unedited, strict=True):
        image = context.open_scan(int(row)).edited(after, before)
        found.append(context.model.embed(context.model.open(image, check=False, preprocess="never")))
    return torch.cat(found)
