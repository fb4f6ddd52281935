"""The config group `bench`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ldae.utils.errors import UserError


@dataclass(frozen=True)
class SpaceComparison:
    """Latent against voxel space, at equal widths and steps.

    Args:
        full: overrides that make the full size, which is counted only.
        reduced: overrides that make the size that is timed.
        steps: of inversion and of sampling, each.
    """

    full: Sequence[str]
    reduced: Sequence[str]
    steps: int


@dataclass(frozen=True)
class MemoryCase:
    """A training step whose bytes are counted.

    Args:
        stage: aekl, pretrain or repr.
        batch: samples of a micro-batch.
        gigabytes: of the device that it should fit.
        overrides: the model.
    """

    stage: str
    batch: int
    gigabytes: float
    overrides: Sequence[str]


@dataclass(frozen=True)
class Bench:
    """What is measured, and how often.

    Args:
        variants: overrides by name; the first is the yardstick, and each further one gains over the one before it.
        tasks: names of tasks.TASKS, in this order.
        batch: samples of a training step, by stage.
        scans: made-up scans on disk.
        repeats: of which the median counts, after one run that does not.
        timed_steps: steps of inversion and sampling that are timed; that of all is in proportion to the evaluations.
            None: all.
        matrix: edge of the matrix product that gives the machine's rate.
        straight: plain attention, contiguous layout, files read at every step, plain loops; set by the yardstick.
        autotune: training steps choose convolution algorithms by trying them, as training does.
        against: bench.json of an earlier run to compare with.
        tolerance: slower by more than this share is a loss.
        output: folder of bench.json.
        voxels: latent against voxel space; None leaves it out.
        memory: training steps whose bytes are counted, by name.
    """

    variants: Mapping[str, Sequence[str]]
    tasks: Sequence[str]
    batch: Mapping[str, int]
    scans: int
    repeats: int
    timed_steps: int | None
    matrix: int
    straight: bool
    autotune: bool
    against: str | None
    tolerance: float
    output: str
    voxels: SpaceComparison | None = None
    memory: Mapping[str, MemoryCase] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.scans < 2:
            raise UserError("bench: at least 1 repeat and 2 scans are needed")
        if self.against is not None and not Path(self.against).is_file():
            raise UserError(f"bench.against={self.against}: there is no such file; give a bench.json of an earlier run")
