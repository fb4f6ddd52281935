"""Does a probe that shares no subject with the direction notice the edit?

The direction is fitted on one half of the training subjects, the probe on the other half. Scans edited along the
direction are embedded anew and read by the probe. A direction that affects only the probe it came from, as adversarial
examples do, does not change this one's output.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch

from ldae.editing.direction import Direction
from ldae.editing.directions import DirectionEstimator, find_direction, labelled_rows
from ldae.editing.editor import Editor
from ldae.editing.linear_model import LinearModel
from ldae.editing.units import AlphaUnit
from ldae.evaluation.context import Context
from ldae.evaluation.edits.alpha_sweep import AlphaSweep
from ldae.evaluation.edits.edited_scans import embed_edited_scans
from ldae.evaluation.probes.targets import Probe
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)


def split_subjects_in_halves(subjects: np.ndarray, truth: np.ndarray, seed: int) -> np.ndarray:
    """Whether each row belongs to the first half of the subjects, (N,) bool; both halves have similar labels."""
    names, first = np.unique(subjects, return_index=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(names))
    order = order[np.argsort(truth[first][order], kind="stable")]  # subjects with neighbouring labels are separated
    chosen = names[order[rng.integers(2) :: 2]]
    return np.isin(subjects, chosen)


@dataclass(frozen=True)
class HeldOutProbe:
    """A direction from one half of the training subjects, and the probe of the other half.

    Attributes:
        alpha: length of the edit, applied in both directions.
    """

    direction: Direction
    model: LinearModel
    alpha: float

    @classmethod
    def fit(
        cls, context: Context, probe: Probe, estimator: DirectionEstimator, alpha: float, unit: AlphaUnit
    ) -> "HeldOutProbe | None":
        """None, with a line in the log, if half of the training subjects is too few."""
        rows = labelled_rows(context.table, probe, context.rows("train"))
        truth, subjects = probe.target(context.table)[rows], context.subjects(rows)
        is_first = split_subjects_in_halves(subjects, truth, context.seed)
        first, second = rows[is_first], rows[~is_first]
        reason = probe.reason_unusable(truth[~is_first], subjects[~is_first], fitting=True)
        try:
            if reason:
                raise UserError(f"half of the train split has {reason}")
            direction = find_direction(estimator, probe, context.table, context.embeddings, first, context.seed, unit)
        except UserError as error:
            log.warning("no held-out probe of %s: %s", probe.column, error)
            return None
        y = context.embeddings[second].astype(np.float64)
        model = probe.fit(y, truth[~is_first], subjects[~is_first], context.seed)
        return cls(direction, model, alpha)

    @torch.no_grad()
    def measure(self, context: Context, editor: Editor, sweep: AlphaSweep) -> dict[str, np.ndarray]:
        """The probe's response to the scans of `sweep`, edited by -alpha and +alpha and embedded anew, (B,) each.

        `independent_slope`: change of its output (log-odds, years, ...) per unit of alpha; `independent_right`: 1 if
        the output rises, else 0.
        """
        scans, embedded = sweep.scans, []
        for alpha in (-self.alpha, self.alpha):
            edited = editor.decode(context.model, scans.code, self.direction.edit(scans.y, alpha))
            embedded.append(embed_edited_scans(context, scans.rows, edited, sweep.images_at(0.0)))
        below, above = torch.stack(embedded).float().cpu().numpy()
        rise = self.model.decision(above) - self.model.decision(below)
        return {"independent_slope": rise / (2 * self.alpha), "independent_right": (rise > 0).astype(np.float64)}
