"""What a stage takes from earlier ones, with the checks that everything belongs together."""

from pathlib import Path

import numpy as np

from ldae.data.cohort import Cohort
from ldae.data.latents import LatentSet
from ldae.data.table import scan_names
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
        raise UserError(
            f"{folder} was made by another autoencoder than {workspace.root / 'aekl'}: run `python encode_latents.py` "
            "again"
        )
    return latents


def refuse_other_split(run: Run, cohort: Cohort, workspace: Workspace) -> None:
    """Refuse a predecessor that was trained on another split of the subjects, unless the cohort's only extends it.

    Raises:
        UserError: it was.
    """
    if not cohort.accepts_split(run.metadata["split_hash"]):
        raise UserError(f"{run.path} was trained on another split of the subjects than {workspace.split_file}")


def match_latents(cohort: Cohort, latents: LatentSet) -> np.ndarray:
    """For each scan of `cohort` the row of its latent, by subject and session; -1 if it has none. (N,) int64.

    Raises:
        UserError: no scan has a latent, or one has changed since it was encoded.
    """
    rows, outdated = latents.find_rows(cohort.table), latents.find_outdated(cohort)
    if not (rows >= 0).any():
        raise UserError("no scan of the table has a latent: run encode_latents.py with the same table")
    if len(outdated):
        name = scan_names(cohort.table, outdated[:1])[0]
        raise UserError(
            f"the latents of {len(outdated)} scans ({name}{', ...' if len(outdated) > 1 else ''}) were made of other "
            "scans than those that the table names now, or of another data.cache_dtype: run `python encode_latents.py` "
            "again with the same name=... and data.*"
        )
    return rows
