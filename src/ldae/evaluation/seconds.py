"""What does the method cost? Seconds of training, and of a scan, so that runs can be compared on one machine.

- `seconds/train/<stage>`: wall seconds of the training loop over all its resumptions, with validation and checkpoints;
  `seconds/train/total`: their sum. A stage that has nothing to train, as stage 1 in voxel space, takes 0; a stage that
  an earlier version of this project trained is not known, and then there is no total.
- `seconds/embed`: of a scan, from its view to y.
- `seconds/reconstruct`: of a scan, to its latent, its code and y, and back by the model's own sampler. In both the
  median over single scans after one that is not counted. `seconds/embed_cpu`, `seconds/reconstruct_cpu`: processor
  seconds of the same, which other programs on the machine hardly change.
"""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from ldae.evaluation.context import Context
from ldae.runs import Workspace

log = logging.getLogger(__name__)

STAGES = ("aekl", "pretrain", "repr")


class Seconds:
    """The evaluation that the module describes.

    Args:
        run: folder `runs/<name>`.
        scans: number of test scans that are timed.
    """

    def __init__(self, run: str | Path, scans: int = 4) -> None:
        self.space, self.scans = Workspace(Path(run)), scans

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        yield from self._training(context)
        rows = context.sample_rows("test", self.scans + 1)
        if len(rows) < 2:
            context.skip("seconds of a scan are not measured: fewer than two test scans")
            return
        for name, work in (("embed", _embed), ("reconstruct", _reconstruct)):
            wall, processor = _median_seconds(context, rows, work)
            yield f"seconds/{name}", wall
            yield f"seconds/{name}_cpu", processor

    def _training(self, context: Context) -> Iterator[tuple[str, float]]:
        found: dict[str, float] = {}
        for stage in STAGES:
            run = self.space.predecessor(stage)
            if run.progress:
                found[stage] = run.progress["seconds"]
            elif not run.metadata["step"]:
                found[stage] = 0.0
            else:
                context.skip(f"seconds of stage {stage} are not known: an earlier version trained {run.path}")
        yield from ((f"seconds/train/{stage}", value) for stage, value in found.items())
        if len(found) == len(STAGES):
            yield "seconds/train/total", sum(found.values())


@torch.no_grad()
def _embed(context: Context, row: int) -> None:
    context.model.embed_views(context.views([row]).to(context.model.device)).cpu()


@torch.no_grad()
def _reconstruct(context: Context, row: int) -> None:
    model = context.model
    y = model.embed_views(context.views([row]).to(model.device))
    z = model.compress(context.volumes([row]).to(model.device))
    model.decompress(model.generate(model.invert(z, y), y)).cpu()


def _median_seconds(context: Context, rows: np.ndarray, work: Callable[[Context, int], None]) -> tuple[float, float]:
    """Median seconds of the wall clock and of the processor over the rows but the first, which also warms up."""
    seconds = []
    for row in rows:
        start = time.perf_counter(), time.process_time()
        work(context, int(row))
        seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    wall, processor = np.median(seconds[1:], axis=0)
    return float(wall), float(processor)
