"""The features of each predictor: the embedding, and the baselines that it is compared with under the same protocol.

mean        no features: always the mean, or always the majority class
age_sex     age and sex; computed only if both can be read from the table, so that it is never age alone
pca         the autoencoder's latents, reduced by PCA
images      the scans at about 4 mm, reduced by PCA
untrained   y of the same semantic encoder before training: `untrained_0` with the weights that this training started
            from, `untrained_1`, ... with further draws of them
volumes     the table's region volumes (columns *_mm3), relative to the head's volume if the table has it
            (`head_mm3`, which remains a feature)
"""

from collections.abc import Callable, Sequence

import numpy as np

from ldae.evaluation.context import Context, iterate_batches
from ldae.evaluation.probes.table_features import VOLUME, describe_values, find_given, read_numbers, read_table_features
from ldae.utils.errors import UserError

BASELINES = ("mean", "age_sex", "pca", "untrained", "volumes")
CHOICES = (*BASELINES, "images")
REDUCED = ("pca", "images")  # by PCA
IMAGES_MM = 4.0
UNTRAINED = "untrained"
MIN_KNOWN = 0.5  # share of the scans whose age and sex must be known
MAX_UNREADABLE = 0.1  # share of the ages and sexes in the table that may be unreadable


def is_draw(name: str) -> bool:
    """Whether a predictor is one draw of the encoder before training."""
    return name.startswith(f"{UNTRAINED}_")


def flatten_latents(context: Context, batch_size: int = 32) -> np.ndarray:
    """Posterior means of all scans, flattened: (N, C X' Y' Z') float32."""
    rows = range(len(context.table))
    parts = [context.posterior(part)[0].flatten(1).numpy() for part in iterate_batches(rows, batch_size)]
    return np.concatenate(parts).astype(np.float32)


def downsample_scans(context: Context, batch_size: int = 8) -> np.ndarray:
    """All scans averaged to voxels of about IMAGES_MM, flattened: (N, voxels) float32."""
    from torch.nn.functional import avg_pool3d

    size = [max(1, round(IMAGES_MM / spacing)) for spacing in context.spacing]
    rows = range(len(context.table))
    parts = [
        avg_pool3d(context.volumes(part).float(), size).flatten(1).numpy() for part in iterate_batches(rows, batch_size)
    ]
    return np.concatenate(parts)


class Features:
    """The features of all scans of a context by the predictor's name, each computed at most once."""

    def __init__(self, context: Context):
        self._context, self._table = context, context.table
        self._compute: dict[str, Callable[[], np.ndarray]] = {
            "embedding": lambda: context.embeddings,
            "mean": lambda: np.zeros((len(context.table), 0)),
            "pca": lambda: flatten_latents(context),
            "images": lambda: downsample_scans(context),
        }
        for draw in range(context.untrained_draws):
            self._compute[f"{UNTRAINED}_{draw}"] = lambda draw=draw: context.untrained(draw)
        self._computed: dict[str, np.ndarray] = {}

    def __call__(self, name: str, columns: list[str] | None = None) -> tuple[list[str], np.ndarray]:
        """The table's columns that a predictor reads (none for some predictors), and its features, (N, D)."""
        if name not in self._compute:
            return read_table_features(self._table, name, columns)
        if name not in self._computed:
            self._computed[name] = self._compute[name]()
        return [], self._computed[name]

    def select_applicable(self, names: Sequence[str], target: str, rows: np.ndarray) -> list[str]:
        """The predictors of the baselines that make sense for predicting the column `target` of the scans `rows`.

        The others are reported with the reason.
        """
        kept = []
        for name in names:
            reason = self.reason_inapplicable(name, target, rows)
            if reason:
                self._context.skip(f"baseline {name} is not computed for {target}: {reason}")
            elif name == UNTRAINED:
                kept += [f"{UNTRAINED}_{draw}" for draw in range(self._context.untrained_draws)]
            else:
                kept.append(name)
        return kept

    def reason_inapplicable(self, name: str, target: str, rows: np.ndarray) -> str | None:
        """Reason why a baseline is not fitted on these scans to predict the column `target`, or None."""
        if name == UNTRAINED:
            try:
                self(f"{UNTRAINED}_0")
            except UserError as error:  # a file of weights that training started from is missing
                return str(error)
        if name == UNTRAINED or name in self._compute:
            return None
        columns, _ = self(name)
        if target in columns:
            return f"{target} is one of its columns"
        if name == "age_sex":
            sexes = np.unique(read_numbers(self._table.iloc[rows], "sex"))
            reason = self.reason_unreadable(name, columns, rows)
            if reason is None and np.isfinite(sexes).sum() < 2:
                reason = f"all scans are of one sex; {describe_values(self._table.iloc[rows], 'sex')}"
            return reason
        return None if columns else f"the table has no region volumes (columns *{VOLUME})"

    def reason_unreadable(self, name: str, columns: Sequence[str], rows: np.ndarray) -> str | None:
        """Reason why a predictor that reads these columns of the table cannot be applied to these scans, or None."""
        if name not in self._compute and not columns:
            return "it was fitted by an earlier version of this project: run evaluation=[probes] again"
        table = self._table.iloc[rows]
        for column in columns:
            known, given = np.isfinite(read_numbers(table, column)), find_given(table, column)
            readable = known.any()
            if name == "age_sex":
                readable = known.mean() >= MIN_KNOWN and (given & ~known).sum() <= MAX_UNREADABLE * given.sum()
            if not readable:
                codes = "; it is read from M, F, male, female" if column == "sex" else ""
                values = describe_values(table, column)
                return f"{column} can be read for {known.sum()} of {len(rows)} scans, {values}{codes}"
        return None
