"""Metrics of a run: metrics.jsonl, TensorBoard, the console with an ETA, and slice previews."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldae.utils.files import sync, write_text

log = logging.getLogger(__name__)


def orthogonal_slices(volumes: Tensor, limit: int = 4) -> Tensor:
    """Middle axial, coronal and sagittal slices of volumes (N, 1, X, Y, Z) in RAS, as one image (H, W) in [0, 1].

    Superior and anterior are up; the left of the image is the subject's left.
    """
    rows = []
    for volume in volumes[:limit, 0].detach().float().cpu():
        x, y, z = (size // 2 for size in volume.shape)
        planes = [volume[:, :, z], volume[:, y, :], volume[x, :, :]]
        images = [plane.T.flip(0) for plane in planes]  # (second axis, first axis), origin at the bottom
        height = max(image.shape[0] for image in images)
        padded = [torch.nn.functional.pad(image, (0, 0, 0, height - image.shape[0])) for image in images]
        rows.append(torch.cat(padded, dim=1))
    return torch.cat(rows).clamp(0, 1)


class Tracker:
    """Writes a run's scalars and pictures; the main process only.

    On resume, what was logged after the resumed step is dropped, so that no step is missing or there twice.
    """

    def __init__(self, folder: Path, name: str, step: int, total: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self.name = name
        self.total = total
        self._jsonl = folder / "metrics.jsonl"
        self._truncate(step)
        # Even at step 0: a run that was killed before its first checkpoint left points.
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
                log.warning("%s: a damaged line is dropped: %.60r", self._jsonl, line)
        write_text(self._jsonl, "".join(f"{line}\n" for line in kept))

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append one record and the TensorBoard points."""
        with open(self._jsonl, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def log_progress(self, step: int, values: Mapping[str, float]) -> None:
        """One console line with the time left."""
        since, first = self._start
        per_step = (time.monotonic() - since) / max(step - first, 1)
        left = time.strftime("%H:%M:%S", time.gmtime(per_step * (self.total - step)))
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.info("%s %d/%d  %s  %.3f s/step  ETA %s", self.name, step, self.total, numbers, per_step, left)

    def log_volumes(self, step: int, pictures: Mapping[str, Any]) -> None:
        """Orthogonal slices of each title's volumes to TensorBoard."""
        for title, volumes in pictures.items():
            self._writer.add_image(title, orthogonal_slices(volumes)[None], step)

    def flush(self) -> None:
        """Have everything on disk: before a checkpoint, which will not log these steps again."""
        self._writer.flush()
        if self._jsonl.exists():
            sync(self._jsonl)

    def close(self) -> None:
        """Flush everything."""
        self._writer.close()
