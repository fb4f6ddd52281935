"""Test subjects with visits over years, for evaluations of change over time.

Synthetic cohorts have visits within two years, and few test subjects with several. Their evaluations of change use
fresh subjects instead, whose visits the config chooses (data.phantom.longitudinal). They are made on first use, are of
another seed than the training cohort, and take the place of the test split. Cohorts of real scans keep their own test
split.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from ldae.data.cohort import Cohort, load_cohort
from ldae.data.phantom.synthetic_cohort import cohort_folder, make_cohort
from ldae.evaluation.context import Context
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

Values = TypeVar("Values", Tensor, np.ndarray)
Regions = Callable[[Sequence[int], Sequence[int]], np.ndarray]


def load_longitudinal_cohort(config: DictConfig, own: Cohort) -> Cohort:
    """Make the longitudinal cohort of a synthetic one if it does not exist, and bring its scans to model space.

    Raises:
        UserError: its seed is that of the training cohort, of which subjects would then be tested.
    """
    phantom = config.data.phantom
    wanted = phantom.longitudinal
    if wanted.seed == phantom.seed:
        raise UserError(
            f"data.phantom.longitudinal.seed={wanted.seed} is the seed of the training cohort: give another one"
        )
    months = [int(month) for month in wanted.months]
    size = (wanted.subjects, wanted.seed, phantom.spacing, tuple(phantom.shape))
    folder = cohort_folder(config.paths.data, *size, months)
    table = make_cohort(folder, *size, workers=config.data.workers, months=months)
    return load_cohort(
        table, None, own.transform, Path(config.paths.cache), {"test": 1.0}, cache_dtype=config.data.cache_dtype,
        workers=config.data.workers, view=own.view,
    )  # fmt: skip


def use_longitudinal_cohort(context: Context, wanted: bool) -> Context:
    """The context with the longitudinal cohort as its test split; itself if it has none, or if none is wanted."""
    if not wanted or context.longitudinal is None:
        return context
    log.info("test subjects are those of the longitudinal cohort (data.phantom.longitudinal)")
    return replace(context.longitudinal(), out=context.out, skipped=context.skipped)


@dataclass(frozen=True)
class _TwoCohorts:
    """Rows of one cohort followed by all rows of another one.

    Attributes:
        kept: the rows of the first cohort.
    """

    kept: np.ndarray

    def read(
        self, first: Callable[[Sequence[int]], Values], second: Callable[[Sequence[int]], Values]
    ) -> Callable[[Sequence[int]], Values]:
        """Reads some rows of both, given what reads the rows of each."""

        def values(rows: Sequence[int]) -> Values:
            rows = np.asarray(rows, int)
            is_first = rows < len(self.kept)
            parts: list[Values | None] = [None] * len(rows)
            for chosen, read in ((is_first, first), (~is_first, second)):
                places = np.flatnonzero(chosen)
                if len(places):
                    own = rows[places]
                    own = self.kept[own] if read is first else own - len(self.kept)
                    for place, value in zip(places, read(own.tolist()), strict=True):
                        parts[place] = value
            return torch.stack(parts) if isinstance(parts[0], Tensor) else np.stack(parts)

        return values


def replace_test_split(own: Context, cohort: Cohort, embeddings: np.ndarray, regions: Regions | None) -> Context:
    """The context with `cohort` in place of its test split.

    Args:
        embeddings: y of the cohort's scans, (N, dim).
        regions: reads the label maps of the cohort's scans; None: label maps are not used.
    """
    kept = own.rows("train", "val")
    both = _TwoCohorts(kept)
    regions_of_both = None
    if own.regions is not None and regions is not None:
        first, second = own.regions, regions

        def regions_of_both(rows: Sequence[int], labels: Sequence[int]) -> np.ndarray:
            return both.read(lambda part: first(part, labels), lambda part: second(part, labels))(rows)

    def not_available(*_: object) -> tuple[Tensor, Tensor]:
        raise UserError("latents and untrained encoders of the longitudinal cohort are not stored")

    return replace(
        own,
        table=pd.concat([own.table.iloc[kept], cohort.table], ignore_index=True),
        volumes=both.read(own.volumes, cohort.volumes.batch),
        seen=None if cohort.view_key is None else both.read(own.views, cohort.views.batch),
        posterior=not_available,
        untrained=not_available,
        embeddings=np.concatenate([own.embeddings[kept], embeddings]),
        regions=regions_of_both,
        open_scan=None,
        longitudinal=None,
    )
