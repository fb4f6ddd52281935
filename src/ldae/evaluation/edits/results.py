"""Collects the edits of a manipulation batch by batch and writes its tables, figures and animations."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from ldae.evaluation.context import Context
from ldae.evaluation.edits import figures
from ldae.evaluation.edits.alpha_sweep import AlphaSweep
from ldae.evaluation.images.image_metrics import to_arrays
from ldae.utils.html_viewer import write_viewer
from ldae.utils.slices import voxel_to_show


@dataclass
class ManipulationResults:
    """The edits of all scans along one direction.

    Attributes:
        label: of the direction; files are named `manipulation_<label>...`.
        shown: the |alpha| of the pictures.
        pictures: how many scans are drawn.
    """

    context: Context
    label: str
    alphas: list[float]
    shown: float
    pictures: int
    _volumes: list[dict[str, np.ndarray]] = field(default_factory=list)
    _identity: list[np.ndarray] = field(default_factory=list)
    _metrics: list[dict[str, np.ndarray]] = field(default_factory=list)
    _drawn: int = 0
    _total: np.ndarray | float = 0.0  # sum of the scans at -shown, 0 and +shown, (3, X, Y, Z)
    _total_true: np.ndarray | float = 0.0  # sum of the true changes, (X, Y, Z)
    _region: np.ndarray | None = None

    def add(
        self,
        sweep: AlphaSweep,
        metrics: dict[str, np.ndarray],
        true_difference: np.ndarray | None,
        region: np.ndarray | None,
    ) -> None:
        """Add one batch and draw the first scans.

        Args:
            metrics: (B,) each.
            true_difference: of the counterfactual at +shown, (B, X, Y, Z), if there is one.
            region: (X, Y, Z) bool, through whose centre slices are drawn; None: the middle of the volume.
        """
        self._volumes.append(sweep.volumes)
        self._identity.append(sweep.identity)
        self._metrics.append(metrics)
        self._total = self._total + np.stack([to_arrays(sweep.images_at(alpha)).sum(0) for alpha in self._ends])
        if true_difference is not None:
            self._total_true = self._total_true + np.asarray(true_difference).sum(0)
        self._region = region
        for place in range(min(self.pictures - self._drawn, len(sweep.scans.rows))):
            self._drawn += 1
            self._draw(sweep, place, None if true_difference is None else true_difference[place], region)

    def volumes(self) -> dict[str, np.ndarray]:
        """Volumes by structure, mm3, (N, A) each."""
        return {name: np.concatenate([part[name] for part in self._volumes]) for name in self._volumes[0]}

    def metrics(self) -> dict[str, np.ndarray]:
        """Metrics per scan, (N,) each."""
        return {name: np.concatenate([part[name] for part in self._metrics]) for name in self._metrics[0]}

    def write(self, rows: np.ndarray, unit: str, still: Sequence[str] = ()) -> None:
        """Write the tables of the scans `rows`, the figure of the dose-response, and the mean of all edited scans.

        Args:
            unit: meaning of alpha = 1.
            still: structures that the direction cannot move.

        `manipulation_<label>.csv` has one row per scan and alpha, `manipulation_<label>_scans.csv` one row per scan.
        """
        volumes, identity = self.volumes(), np.concatenate(self._identity)
        scans = self.context.table.iloc[rows][["subject", "session"]].reset_index(drop=True)
        curves = [
            scans.assign(
                alpha=alpha,
                ssim_mask=identity[:, place],
                **{f"{name}_mm3": values[:, place] for name, values in volumes.items()},
            )
            for place, alpha in enumerate(self.alphas)
        ]
        self.context.write_csv(f"{self._stem}.csv", pd.concat(curves))
        self.context.write_csv(f"{self._stem}_scans.csv", scans.assign(**self.metrics()))
        if volumes:
            path = self.context.out / f"{self._stem}_dose.png"
            figures.draw_dose_response(path, self.alphas, volumes, identity, f"{self.label}; alpha = 1: {unit}", still)
        true = None if np.ndim(self._total_true) == 0 else self._total_true / len(rows)
        title = f"Mean of {len(rows)} scans, edited along {self.label}"
        self._draw_strip("mean", self._total / len(rows), true, self._region, title)

    @property
    def _stem(self) -> str:
        return f"manipulation_{self.label}"

    def _draw(
        self, sweep: AlphaSweep, place: int, true_difference: np.ndarray | None, region: np.ndarray | None
    ) -> None:
        frames = to_arrays(sweep.images[:, place])  # (A, X, Y, Z)
        ends = frames[[self.alphas.index(alpha) for alpha in self._ends]]
        title = f"{self.context.scan_name(sweep.scans.rows[place])}: edited along {self.label}"
        cut = self._draw_strip(str(self._drawn), ends, true_difference, region, title)
        captions = [f"alpha = {alpha:+.2f}" for alpha in self.alphas]
        out, stem = self.context.out, f"{self._stem}_{self._drawn}"
        figures.write_animation(out / f"{stem}.gif", frames, captions, cut)
        if self._drawn == 1:  # a viewer takes a megabyte
            viewed = dict(zip(captions, frames, strict=True))
            reference = captions[self.alphas.index(0.0)]
            write_viewer(out / f"{stem}.html", title, viewed, reference, self.context.spacing)

    @property
    def _ends(self) -> tuple[float, float, float]:
        return -self.shown, 0.0, self.shown

    def _draw_strip(
        self, suffix: str, ends: np.ndarray, true_difference: np.ndarray | None, region: np.ndarray | None, title: str
    ) -> tuple[int, int, int]:
        """Draw images at -shown, 0 and +shown, (3, X, Y, Z), and their changes; returns the voxel they are cut at."""
        cut = voxel_to_show(region, ends.shape[1:])
        low, unedited, high = ends
        volumes = [(f"alpha = {-self.shown:+g}", low), ("alpha = 0", unedited), (f"alpha = {self.shown:+g}", high)]
        changes = [(f"change at {-self.shown:+g}", low - unedited), (f"change at {self.shown:+g}", high - unedited)]
        if true_difference is not None:
            changes.append((f"true change at {self.shown:+g}", true_difference))
        figures.draw_strip(self.context.out / f"{self._stem}_{suffix}.png", volumes, changes, cut, title)
        return cut
