"""The features of each predictor: the embedding, and the baselines that it is compared with under the same protocol.

mean            no features: always the mean, or always the majority class
age_sex         age and sex; computed only if both can be read from the table, so that it is never age alone
pca_view        principal components of what the encoder sees (data.view)
pca_images      principal components of the scans at about 4 mm
pca             principal components of the autoencoder's latents
pca_view_and_y  those of the view and y side by side: whether y tells more than the components alone
components      y without its learned residual, for an encoder that starts from components
residual        the learned residual of y alone, likewise
untrained       y of the same semantic encoder before training: `untrained_0` with the weights that this training
                started from, `untrained_1`, ... with further draws of them
supervised      the same encoder with a linear head, trained on the labels of the training split (stage=supervised); it
                predicts itself (ldae.evaluation.supervised)
volumes         the table's region volumes (columns *_mm3), relative to the head's volume if the table has it
volumes_head    the same and the head's size

The head's size (columns head_mm3, affine_determinant) can be added to every predictor with features.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ldae.editing.frozen_probes import EMBEDDING
from ldae.evaluation.context import Context
from ldae.evaluation.probes.principal_components import ScanMatrix
from ldae.evaluation.probes.sources import ArraySource, ComponentSource, Source
from ldae.evaluation.probes.table_features import (
    HEAD_SIZE,
    TABLE_FEATURES,
    VOLUME,
    describe_values,
    find_columns,
    find_given,
    find_head_columns,
    read_columns,
    read_numbers,
)
from ldae.utils.errors import UserError

PARTS = ("components", "residual")  # of y, see ldae.models.components_encoder
UNTRAINED, SUPERVISED, STACKED, VIEW = "untrained", "supervised", "pca_view_and_y", "pca_view"
BASELINES = (
    "mean",
    "age_sex",
    VIEW,
    "pca_images",
    "pca",
    STACKED,
    *PARTS,
    UNTRAINED,
    SUPERVISED,
    "volumes",
    "volumes_head",
)
RENAMED = {"images": "pca_images"}  # names that an earlier version of this project stored
SOURCES = {  # the sources of predictors that have another than the one of their own name
    EMBEDDING: ("y",), "mean": (), VIEW: ("view",), "pca_images": ("images",), "pca": ("latents",),
    STACKED: ("view", "y"), SUPERVISED: (),
}  # fmt: skip
WIDTHS = (64,)  # numbers of principal components: that of the encoder that starts from components
IMAGES_MM = 4.0
MIN_KNOWN = 0.5  # share of the scans whose age and sex must be known
MAX_UNREADABLE = 0.1  # share of the ages and sexes in the table that may be unreadable


def is_draw(name: str) -> bool:
    """Whether a predictor is one draw of the encoder before training."""
    return name.startswith(f"{UNTRAINED}_")


def check_baselines(names: Sequence[str], key: str) -> None:
    """Refuse an unknown baseline, naming the config's `key`."""
    unknown = sorted(set(names) - set(BASELINES) - set(RENAMED))
    if unknown:
        raise UserError(f"{key}: unknown {unknown[0]!r}, choose from {', '.join(BASELINES)}")


class Features:
    """The features of all scans of a context by the predictor's name, each read or computed at most once.

    Args:
        widths: numbers of principal components to choose from.
        head_size: whether the head's size is a feature of every predictor that has features.
        known_rows: rows that all principal components are fitted on, because the encoder saw them as well; None: those
            that a probe is fitted on.

    Raises:
        UserError: `head_size`, and the table has no head size.
    """

    def __init__(
        self,
        context: Context,
        widths: Sequence[int] = WIDTHS,
        head_size: bool = False,
        known_rows: np.ndarray | None = None,
    ):
        self._context, self._table = context, context.table
        self._widths, self._known_rows = widths, known_rows
        self._head = find_head_columns(context.table) if head_size else []
        if head_size and not self._head:
            raise UserError(f"head_size=true: the table has none of the columns {', '.join(HEAD_SIZE)}")
        self._compute: dict[str, Callable[[], Source]] = {
            "y": lambda: ArraySource(context.embeddings),
            "view": lambda: self._components(lambda rows: context.views(rows).float()),
            "images": lambda: self._components(lambda rows: downsample(context, rows)),
            "latents": lambda: self._components(lambda rows: context.posterior(rows)[0].float()),
        }
        for draw in range(context.untrained_draws):
            self._compute[f"{UNTRAINED}_{draw}"] = lambda draw=draw: ArraySource(context.untrained(draw))
        for part in PARTS:
            self._compute[part] = lambda part=part: ArraySource(self._part(part))
        self._computed: dict[str, Source] = {}

    def __call__(self, name: str, columns: list[str] | None = None) -> tuple[list[str], list[Source]]:
        """The features that a predictor reads from the table (none for some), and its sources; the table's is last.

        Args:
            columns: exactly those that a frozen predictor reads; None: what the table has.
        """
        name = RENAMED.get(name, name)
        if columns is None:
            columns = [] if name not in TABLE_FEATURES else find_columns(self._table, name)
            extra = [column for column in self._head if column not in columns]
            columns += extra if columns or _sources_of(name) else []
        sources = [self._source(source) for source in _sources_of(name)]
        if columns:
            sources.append(ArraySource(read_columns(self._table, columns), are_columns=True))
        return columns, sources

    def _source(self, name: str) -> Source:
        if name not in self._computed:
            self._computed[name] = self._compute[name]()
        return self._computed[name]

    def _components(self, read: Callable[[Sequence[int]], Tensor]) -> ComponentSource:
        matrix = ScanMatrix(lambda rows: read(list(rows)).flatten(1).numpy(), len(self._table))
        return ComponentSource(matrix, self._widths, self._known_rows)

    def _part(self, name: str) -> np.ndarray:
        """What y owes to one part of the encoder, (N, dim)."""
        with torch.no_grad():
            y = torch.from_numpy(np.asarray(self._context.embeddings, np.float32)).to(self._context.model.device)
            return self._context.model.encoder.parts(y)[name].float().cpu().numpy()

    def select_applicable(self, names: Sequence[str], target: str, rows: np.ndarray) -> list[str]:
        """The predictors of the baselines that make sense for predicting the column `target` of the scans `rows`.

        The others are reported with the reason, except for parts that this encoder does not have. `supervised`, which
        has no features, is none of them.
        """
        kept = []
        for name in (RENAMED.get(name, name) for name in names):
            if name == SUPERVISED or (name in PARTS and not self._has_parts()):
                continue
            reason = self.reason_inapplicable(name, target, rows)
            if reason:
                self._context.skip(f"baseline {name} is not computed for {target}: {reason}")
            elif name == UNTRAINED:
                kept += [f"{UNTRAINED}_{draw}" for draw in range(self._context.untrained_draws)]
            else:
                kept.append(name)
        return kept

    def _has_parts(self) -> bool:
        """Whether y is made of components and a learned residual."""
        encoder = getattr(self._context.model, "encoder", None)
        return getattr(encoder, "residual", None) is not None and hasattr(encoder, "parts")

    def reason_inapplicable(self, name: str, target: str, rows: np.ndarray) -> str | None:
        """Reason why a baseline is not fitted on these scans to predict the column `target`, or None."""
        if name == UNTRAINED:
            try:
                self._source(f"{UNTRAINED}_0")
            except UserError as error:  # a file of weights that training started from is missing
                return str(error)
        if name not in TABLE_FEATURES:
            return None
        columns, _ = self(name)
        if any(target in column.split("/") for column in columns):
            return f"{target} is one of its columns"
        if name == "age_sex":
            sexes = np.unique(read_numbers(self._table.iloc[rows], "sex"))
            reason = self.reason_unreadable(name, columns, rows)
            if reason is None and np.isfinite(sexes).sum() < 2:
                reason = f"all scans are of one sex; {describe_values(self._table.iloc[rows], 'sex')}"
            return reason
        if find_columns(self._table, name):
            return None
        missing = f"no region volumes (columns *{VOLUME})"
        if name == "volumes_head" and find_columns(self._table, "volumes"):
            missing = f"no head size (columns {', '.join(HEAD_SIZE)})"
        return f"the table has {missing}"

    def reason_unreadable(self, name: str, columns: Sequence[str], rows: np.ndarray) -> str | None:
        """Reason why a predictor that reads these columns of the table cannot be applied to these scans, or None."""
        name = RENAMED.get(name, name)
        if not all(source in self._compute for source in _sources_of(name)) or (name in TABLE_FEATURES and not columns):
            return "it was fitted by an earlier version of this project: run evaluation=[probes] again"
        if name in PARTS and not self._has_parts():
            return "the encoder has no such part"
        table = self._table.iloc[rows]
        for column in columns:
            known, given = np.isfinite(read_numbers(table, column)), find_given(table, column)
            readable = known.any()
            if name == "age_sex" and column in ("age", "sex"):
                readable = known.mean() >= MIN_KNOWN and (given & ~known).sum() <= MAX_UNREADABLE * given.sum()
            if not readable:
                codes = "; it is read from M, F, male, female" if column == "sex" else ""
                values = describe_values(table, column)
                return f"{column} can be read for {known.sum()} of {len(rows)} scans, {values}{codes}"
        return None


def _sources_of(name: str) -> Sequence[str]:
    """What a predictor reads besides the table."""
    return () if name in TABLE_FEATURES else SOURCES.get(name, (name,))


def downsample(context: Context, rows: Sequence[int]) -> Tensor:
    """Scans averaged to voxels of about IMAGES_MM, (B, 1, X', Y', Z')."""
    from torch.nn.functional import avg_pool3d

    size = [max(1, round(IMAGES_MM / spacing)) for spacing in context.spacing]
    return avg_pool3d(context.volumes(rows).float(), size)
