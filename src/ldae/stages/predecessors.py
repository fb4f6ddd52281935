"""What a stage takes from earlier ones, with the checks that everything belongs together."""

from pathlib import Path

import numpy as np
import pandas as pd

from ldae.data.latents import LatentSet
from ldae.runs import Run, Workspace
from ldae.utils.errors import UserError


def open_latents(path: str | None, split_hash: str | None, workspace: Workspace) -> LatentSet:
    """The latents of a workspace, or of the folder `path`.

    Args:
        split_hash: of the split that they must belong to; None if the workspace has no split of its own.

    Raises:
        UserError: they belong to another split or to another autoencoder than the workspace.
    """
    folder = Path(path) if path else workspace.latents
    latents = LatentSet.open(folder)
    if split_hash is not None and latents.split_hash != split_hash:
        raise UserError(f"{folder} was made for another split of the subjects: run encode_latents.py again")
    # A machine may have the latents without the autoencoder that made them.
    has_autoencoder = path is None and workspace.has("aekl")
    if has_autoencoder and latents.autoencoder != workspace.predecessor("aekl").sha256("autoencoder"):
        raise UserError(f"{folder} was made by another autoencoder than {workspace.root / 'aekl'}: encode again")
    return latents


def refuse_other_split(run: Run, split_hash: str, workspace: Workspace) -> None:
    """Refuse a predecessor that was trained on another split of the subjects.

    Raises:
        UserError: it was.
    """
    if run.metadata["split_hash"] != split_hash:
        raise UserError(f"{run.path} was trained on another split of the subjects than {workspace.split_file}")


def match_latents(table: pd.DataFrame, latents: LatentSet) -> np.ndarray:
    """For each scan of `table` the row of its latent, by subject and session; -1 if it has none. (N,) int64.

    Raises:
        UserError: no scan has a latent.
    """
    key = ["subject", "session"]
    latent_rows = {scan: row for row, scan in enumerate(latents.table[key].itertuples(index=False, name=None))}
    rows = np.array([latent_rows.get(scan, -1) for scan in table[key].itertuples(index=False, name=None)])
    if not (rows >= 0).any():
        raise UserError("no scan of the table has a latent: run encode_latents.py with the same table")
    return rows
