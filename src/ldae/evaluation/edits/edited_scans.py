"""Edited scans, as `ldae manipulate` writes them: the scan plus the change; and their semantic vectors."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from ldae.data.nifti import BadScan
from ldae.evaluation.context import Context

log = logging.getLogger(__name__)


def add_change(x: Tensor, change: Tensor) -> Tensor:
    """Scans (B, 1, X, Y, Z) in model space plus a change, in [0, 1]; their background stays, as in `Scan.edited`."""
    return torch.where(x > 0, (x + change).clamp(0, 1), x)


@torch.no_grad()
def embed_edited_scans(context: Context, rows: Sequence[int], edited: Tensor, unedited: Tensor) -> Tensor:
    """y of scans with the change between two decoded images added, (B, dim).

    A decoded image has larger voxels than the scan, and less detail. Tissue maps that are made of it differ from those
    of the scan for this reason alone, by more than an edit changes them.

    Args:
        rows: of the scans.
        edited, unedited: decoded images, (B, 1, X, Y, Z). Where only volumes are at hand, or the view of an edited scan
            cannot be made, `edited` itself is embedded.
    """
    if context.open_scan is None:
        return context.model.embed(edited)
    model = context.model
    see = model.transform if model.view is None else model.view  # without the remarks that opening a scan logs
    found, unseen = [], 0
    for row, after, before in zip(rows, edited, unedited, strict=True):
        try:
            view = torch.from_numpy(see(context.open_scan(int(row)).edited(after, before)))[None].to(model.device)
            found.append(model.embed_views(view))
        except BadScan as error:
            log.debug("row %d: %s", row, error)
            found.append(model.embed(after[None]))
            unseen += 1
    if unseen:
        log.warning("%d of %d edited scans have no view: that of the decoded image is used", unseen, len(found))
    return torch.cat(found)
