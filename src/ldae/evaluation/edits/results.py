"""What a manipulation leaves behind beside its metrics: tables of curves and of scans, figures and animations."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from ldae.evaluation.edits import figures as edit_figures
from ldae.evaluation.edits.alpha_sweep import AlphaSweep
from ldae.evaluation.images.image_metrics import to_arrays
from ldae.utils.files import replacing
from ldae.utils.html_viewer import write_viewer
from ldae.utils.slices import voxel_to_show


@dataclass
class ManipulationResults:
    """Collects batches. stem: path that file names begin with; pictures: how many scans are drawn."""

    stem: Path
    alphas: list[float]
    shown: float
    pictures: int
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)  # voxel size, mm
    _volumes: list[dict[str, np.ndarray]] = field(default_factory=list)
    _identity: list[np.ndarray] = field(default_factory=list)
    _numbers: list[dict[str, np.ndarray]] = field(default_factory=list)
    _drawn: int = 0

    def add(
        self,
        ladder: AlphaSweep,
        numbers: dict[str, np.ndarray],
        true: np.ndarray | None,
        table: pd.DataFrame,
        region: np.ndarray | None,
    ) -> None:
        """One batch: numbers (B,) each, true difference at +shown (B, X, Y, Z) or None; draws the first scans."""
        self._volumes.append(ladder.volumes)
        self._identity.append(ladder.identity)
        self._numbers.append(numbers)
        for place in range(min(self.pictures - self._drawn, len(table))):
            self._drawn += 1
            self._draw(ladder, place, None if true is None else true[place], table.iloc[place], region)

    def volumes(self) -> dict[str, np.ndarray]:
        """mm3 by structure, (N, A) each."""
        return {name: np.concatenate([part[name] for part in self._volumes]) for name in self._volumes[0]}

    def numbers(self) -> dict[str, np.ndarray]:
        """(N,) each."""
        return {name: np.concatenate([part[name] for part in self._numbers]) for name in self._numbers[0]}

    def write(self, table: pd.DataFrame) -> None:
        """`<stem>.csv`, a row for every scan and alpha; `<stem>_scans.csv`, a row a scan; the dose-response figure."""
        volumes, identity = self.volumes(), np.concatenate(self._identity)
        who = table[["subject", "session"]].reset_index(drop=True)
        curves = [
            who.assign(
                alpha=alpha,
                ssim_mask=identity[:, place],
                **{f"{name}_mm3": values[:, place] for name, values in volumes.items()},
            )
            for place, alpha in enumerate(self.alphas)
        ]
        for name, frame in (("", pd.concat(curves)), ("_scans", who.assign(**self.numbers()))):
            with replacing(self._path(f"{name}.csv")) as temporary:
                frame.to_csv(temporary, index=False)
        if volumes:
            edit_figures.draw_dose_response(self._path("_dose.png"), self.alphas, volumes, identity)

    def _path(self, end: str) -> Path:
        return self.stem.with_name(self.stem.name + end)

    def _draw(
        self, ladder: AlphaSweep, place: int, true: np.ndarray | None, row: pd.Series, region: np.ndarray | None
    ) -> None:
        frames = to_arrays(ladder.images[:, place])  # (A, X, Y, Z)
        cut = voxel_to_show(region, frames.shape[1:])
        ends = [self.alphas.index(end) for end in (-self.shown, 0.0, self.shown)]
        title = f"{row['subject']} {row['session']}: {self.stem.name.replace('_', ' along ', 1)}"
        shown = [(f"alpha = {self.alphas[end]:+g}".replace("+0", "0"), frames[end]) for end in ends]
        changes = [(f"change at {label.removeprefix('alpha = ')}", frame - frames[ends[1]]) for label, frame in shown]
        changes = [changes[0], changes[2]]
        if true is not None:
            changes.append((f"true change at {self.shown:+g}", true))
        edit_figures.draw_strip(self._path(f"_{self._drawn}.png"), shown, changes, cut, title)
        captions = [f"alpha = {alpha:+.2f}" for alpha in self.alphas]
        edit_figures.write_animation(self._path(f"_{self._drawn}.gif"), frames, captions, cut)
        if self._drawn == 1:  # a megabyte each
            named = dict(zip(captions, frames, strict=True))
            write_viewer(self._path("_1.html"), title, named, captions[ends[1]], self.spacing)
