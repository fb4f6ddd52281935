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
        """Write the tables of the scans `rows`, and the figure of the dose-response.

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

    @property
    def _stem(self) -> str:
        return f"manipulation_{self.label}"

    def _draw(
        self, sweep: AlphaSweep, place: int, true_difference: np.ndarray | None, region: np.ndarray | None
    ) -> None:
        frames = to_arrays(sweep.images[:, place])  # (A, X, Y, Z)
        cut = voxel_to_show(region, frames.shape[1:])
        low, unedited, high = (frames[self.alphas.index(alpha)] for alpha in (-self.shown, 0.0, self.shown))
        volumes = [(f"alpha = {-self.shown:+g}", low), ("alpha = 0", unedited), (f"alpha = {self.shown:+g}", high)]
        changes = [(f"change at {-self.shown:+g}", low - unedited), (f"change at {self.shown:+g}", high - unedited)]
        if true_difference is not None:
            changes.append((f"true change at {self.shown:+g}", true_difference))
        title = f"{self.context.scan_name(sweep.scans.rows[place])}: edited along {self.label}"
        captions = [f"alpha = {alpha:+.2f}" for alpha in self.alphas]
        out, stem = self.context.out, f"{self._stem}_{self._drawn}"
        figures.draw_strip(out / f"{stem}.png", volumes, changes, cut, title)
        figures.write_animation(out / f"{stem}.gif", frames, captions, cut)
        if self._drawn == 1:  # a viewer takes a megabyte
            viewed = dict(zip(captions, frames, strict=True))
            reference = captions[self.alphas.index(0.0)]
            write_viewer(out / f"{stem}.html", title, viewed, reference, self.context.spacing)
