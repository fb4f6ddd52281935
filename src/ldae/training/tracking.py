"""Log of a run: metrics.jsonl, TensorBoard with slices of preview volumes, and console lines with the time left."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from ldae.utils.files import sync, write_text
from ldae.utils.slices import slices_to_show

log = logging.getLogger(__name__)


def orthogonal_slices(volumes: Tensor, limit: int = 4) -> np.ndarray:
    """Middle axial, coronal and sagittal slices of the first `limit` volumes, as one image (H, W) in [0, 1].

    Args:
        volumes: (N, 1, X, Y, Z) in RAS; every volume gives one row of the image.
    """
    rows = []
    for volume in volumes[:limit, 0].detach().float().cpu().numpy():
        images = list(slices_to_show(volume).values())
        height = max(image.shape[0] for image in images)
        padded = [np.pad(image, ((0, height - image.shape[0]), (0, 0))) for image in images]
        rows.append(np.concatenate(padded, axis=1))
    return np.concatenate(rows).clip(0, 1)


class Tracker:
    """Writes the scalars and preview images of a run; used by the main process only.

    When a run is resumed, entries after the resumed step are removed first, so that no step is logged twice.

    Args:
        folder: of the run.
        name: of the stage, for console lines.
        step: at which the run starts or resumes.
        total: number of optimiser steps of the whole training.
    """

    def __init__(self, folder: Path, name: str, step: int, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.name = name
        self.total = total
        self._jsonl = folder / "metrics.jsonl"
        self._truncate(step)
        # Also at step 0: a run that was killed before its first checkpoint has left entries.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self._start = (time.monotonic(), step)

    def _truncate(self, step: int) -> None:
        if not self._jsonl.exists():
            return
        kept = []
        for line in self._jsonl.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                log.warning("%s: removing a damaged line: %.60r", self._jsonl, line)
        write_text(self._jsonl, "".join(f"{line}\n" for line in kept))

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append a record to metrics.jsonl and to TensorBoard."""
        with open(self._jsonl, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_progress(self, step: int, values: Mapping[str, float]) -> None:
        """Write a console line with the time left."""
        since, first = self._start
        per_step = (time.monotonic() - since) / max(step - first, 1)
        left = time.strftime("%H:%M:%S", time.gmtime(per_step * (self.total - step)))
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("%s %d/%d  %s  %.3f s/step  ETA %s", self.name, step, self.total, numbers, per_step, left)

    def log_volumes(self, step: int, previews: Mapping[str, Tensor]) -> None:
        """Write orthogonal slices of volumes (N, 1, X, Y, Z) to TensorBoard, one image per title."""
        for title, volumes in previews.items():
            self._writer.add_image(title, orthogonal_slices(volumes)[None], step)

    def flush(self) -> None:
        """Write everything to disk. Needed before a checkpoint: a resumed run does not log these steps again."""
        self._writer.flush()
        if self._jsonl.exists():
            sync(self._jsonl)

    def close(self) -> None:
        """Write everything to disk and close the files."""
        self._writer.close()
