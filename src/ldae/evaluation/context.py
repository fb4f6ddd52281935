"""What every evaluation receives: the trained model, the cohort, and the folder for its results.

An evaluation is a small class that `conf/evaluation` names. Called with a `Context`, it yields (name, number) pairs for
metrics.json and writes its tables and figures to `Context.out`.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ldae.data.subsampling import subsample_by_subject
from ldae.utils.files import replacing
from ldae.utils.results_record import Source

if TYPE_CHECKING:
    from ldae.evaluation.supervised import SupervisedTwins
    from ldae.pipeline import LDAE
    from ldae.scans.scan import Scan

log = logging.getLogger(__name__)


@dataclass
class Context:
    """One cohort as one trained model sees it. Row i of every array belongs to row i of `table`.

    Attributes:
        model: the trained model.
        table: one row per scan: subject, session, months, diagnosis, age, split and any further columns.
        volumes: reads the scans of some rows: (B, 1, X, Y, Z) in model space, float32 in [0, 1].
        posterior: mean and standard deviation of the unscaled latents of some rows, (B, C, X', Y', Z') each.
        embeddings: y of every row, (N, dim) float32.
        untrained: computes the embeddings of the encoder before training, (N, dim) float32, for draw 0, 1, ... of its
            initial weights. Draw 0 is the start of this very training. Called only if a baseline needs them.
        out: folder for the results.
        spacing: voxel size of the scans in model space, mm.
        seed: seeds the evaluations' own draws (noise, bootstrap, folds).
        weights: hash of the weights of encoder and autoencoder; frozen probes that belong to other weights are refused.
        regions: (row numbers, label numbers) -> fraction of each voxel that these labels of the label maps cover,
            (B, X, Y, Z) float32; None if the table has no label maps.
        perceptual: (x, reference) -> LPIPS, averaged over the batch; None if no weights are configured.
        untrained_draws: number of draws that `untrained` can give.
        source: weights, table and split that the results are computed from.
        prefix: what the names of metrics of another cohort begin with, such as "external/"; empty for the model's own.
        skipped: what was not computed, each with the reason; see `skip`.
        seen: reads what the encoder sees of the scans of some rows; None: the volumes. See `views`.
        open_scan: opens the scan of a row on its own grid; None if only volumes are at hand.
        supervised: the supervised networks of the run; None if the context does not belong to a run.
        longitudinal: makes the context in which fresh subjects with visits over years are the test split; None if the
            cohort is not synthetic.
    """

    model: "LDAE"
    table: pd.DataFrame
    volumes: Callable[[Sequence[int]], Tensor]
    posterior: Callable[[Sequence[int]], tuple[Tensor, Tensor]]
    embeddings: np.ndarray
    untrained: Callable[[int], np.ndarray]
    out: Path
    spacing: tuple[float, float, float]
    seed: int = 0
    weights: str = ""
    regions: Callable[[Sequence[int], Sequence[int]], np.ndarray] | None = None
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None
    untrained_draws: int = 5
    source: Source = field(default_factory=Source)
    prefix: str = ""
    skipped: list[str] = field(default_factory=list)
    seen: Callable[[Sequence[int]], Tensor] | None = None
    open_scan: Callable[[int], "Scan"] | None = None
    supervised: "SupervisedTwins | None" = None
    longitudinal: "Callable[[], Context] | None" = None

    def views(self, rows: Sequence[int]) -> Tensor:
        """What the encoder sees of the scans of these rows, (B, channels, X, Y, Z) float32 in [0, 1]."""
        return (self.seen or self.volumes)(rows)

    def skip(self, what: str) -> None:
        """Log what is not computed and why, and keep it for the report."""
        log.warning("%s", what)
        self.skipped.append(what)

    def rows(self, *splits: str) -> np.ndarray:
        """Row numbers of the scans that belong to any of `splits`."""
        return np.flatnonzero(self.table["split"].isin(splits).to_numpy())

    def sample_rows(self, split: str, count: int | None) -> np.ndarray:
        """At most `count` rows of a split (None: all of them), from as many subjects as possible."""
        return subsample_by_subject(self.rows(split), self.table["subject"].tolist(), count, self.seed)

    def subjects(self, rows: Sequence[int]) -> np.ndarray:
        """The subject of each of these rows, (B,) strings."""
        return self.table["subject"].to_numpy(str)[rows]

    def scan_name(self, row: int) -> str:
        """Subject and session of a row, for the titles of figures."""
        return f"{self.table['subject'].iloc[row]} {self.table['session'].iloc[row]}"

    def y(self, rows: Sequence[int]) -> Tensor:
        """Embeddings of these rows on the model's device, (B, dim)."""
        return torch.from_numpy(np.asarray(self.embeddings[list(rows)], np.float32)).to(self.model.device)

    def write_csv(self, name: str, table: pd.DataFrame) -> None:
        """Write a table of results to `out`, atomically and without its index."""
        with replacing(self.out / name) as temporary:
            table.to_csv(temporary, index=False)


class Evaluator(Protocol):
    """An evaluation: yields (name, number) pairs, whose names become the keys of metrics.json."""

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]: ...


def iterate_batches(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    """`rows` in consecutive lists of at most `size`."""
    rows = [int(row) for row in rows]
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
