"""A judge that knows nothing of the direction: probe and direction are fitted on disjoint halves of the train subjects.

The scan edited along the first half's direction is embedded anew, and the second half's probe reads it. A direction
that only pleases its own probe, as adversarial examples do, does not move this one.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ldae.editing.directions import Direction, DirectionEstimator, find_direction, labelled_rows
from ldae.editing.editor import Editor
from ldae.editing.linear_model import LinearModel
from ldae.evaluation.context import Context
from ldae.evaluation.edits.inverted_scans import InvertedScans
from ldae.evaluation.probes.fitting import fit
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)


def split_subjects_in_halves(subjects: np.ndarray, truth: np.ndarray, seed: int) -> np.ndarray:
    """(N,) bool: membership of one half of the subjects, with about the same labels in both halves."""
    names, first = np.unique(subjects, return_index=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(names))
    order = order[np.argsort(truth[first][order], kind="stable")]  # neighbours in the label go to different halves
    chosen = names[order[rng.integers(2) :: 2]]
    return np.isin(subjects, chosen)


@dataclass(frozen=True)
class HeldOutProbe:
    """direction: of one half; model: the other half's probe; alpha: how far scans are moved, both ways."""

    direction: Direction
    model: LinearModel
    alpha: float

    @classmethod
    def fit(cls, context: Context, probe: Any, estimator: DirectionEstimator, alpha: float) -> "HeldOutProbe | None":
        """None (and a line in the log) where half of the train subjects is too few."""
        table = context.table
        rows = labelled_rows(table, probe, context.rows("train"))
        truth, subjects = probe.target(table)[rows], table["subject"].to_numpy(str)[rows]
        member = split_subjects_in_halves(subjects, truth, context.seed)
        why = probe.reason_unusable(truth[~member], subjects[~member], fitting=True)
        try:
            if why:
                raise UserError(f"half of the train split has {why}")
            direction = find_direction(estimator, probe, table, context.embeddings, rows[member], context.seed)
        except UserError as error:
            log.warning("no independent probe of %s: %s", probe.column, error)
            return None
        held = rows[~member]
        model = fit(probe, context.embeddings[held].astype(np.float64), truth[~member], subjects[~member], context.seed)
        return cls(direction, model, alpha)

    @torch.no_grad()
    def effect(self, context: Context, editor: Editor, opened: InvertedScans) -> dict[str, np.ndarray]:
        """(B,) each: `independent_slope`, log-odds (or years, ...) per unit alpha; `independent_right`, did it rise.

        Both between the scans decoded at -alpha and +alpha and embedded anew.
        """
        embedded = []
        for alpha in (-self.alpha, self.alpha):
            edited = editor.decode(context.model, opened.code, self.direction.edit(opened.y, alpha))
            embedded.append(context.model.embed(edited))
        below, above = torch.stack(embedded).float().cpu().numpy()
        rise = self.model.decision(above) - self.model.decision(below)
        return {"independent_slope": rise / (2 * self.alpha), "independent_right": (rise > 0).astype(np.float64)}
