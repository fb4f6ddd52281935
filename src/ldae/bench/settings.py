"""Settings of the bench: the config group `bench`."""

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldae.utils.errors import UserError


@dataclass(frozen=True)
class SpaceComparison:
    """Latent space against voxel space, with equal widths and steps.

    Args:
        full: overrides for the full size, whose operations are counted.
        reduced: overrides for the size that is timed.
        steps: number of steps of inversion, and of sampling.
    """

    full: list[str]
    reduced: list[str]
    steps: int


@dataclass(frozen=True)
class MemoryCase:
    """A training step whose memory is computed.

    Args:
        stage: aekl, pretrain or repr.
        batch: samples in a micro-batch.
        gigabytes: memory of the device that it should fit.
        overrides: choose the model.
    """

    stage: str
    batch: int
    gigabytes: float
    overrides: list[str]


@dataclass(frozen=True)
class Bench:
    """What is measured, and how often.

    Args:
        variants: overrides by name. The first is the straight port; of each other one, the gain over the one before it
            is computed.
        tasks: names of tasks (tasks.TASKS), in the order in which they are measured.
        batch: samples in a training step, by stage.
        scans: number of made-up scans on disk.
        repeats: number of timed calls, whose median counts.
        timed_steps: number of steps of inversion and sampling that are timed, from which the time of all is
            extrapolated. None: all are timed.
        matrix: edge of the matrix product that measures the machine's rate.
        straight: whether this variant is the straight port: plain kernels, files read at every step, plain loops.
        autotune: whether training steps choose convolution algorithms by trying them, as training does.
        against: bench.json of an earlier run to compare with.
        tolerance: share by which a task may be slower than in that run.
        output: folder for bench.json.
        voxels: comparison of latent and voxel space; None leaves it out.
        memory: training steps whose memory is computed, by name.
    """

    variants: dict[str, list[str]]
    tasks: list[str]
    batch: dict[str, int]
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
    memory: dict[str, MemoryCase] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            OmegaConf.structured(self)  # compares the values with the types above, before anything is measured
        except OmegaConfBaseException as error:
            raise UserError(f"bench.{error.full_key}: {str(error).splitlines()[0]}") from error
        if self.repeats < 1 or self.scans < 2:
            raise UserError("bench: at least 1 repeat and 2 scans are needed")
        if self.against is not None and not Path(self.against).is_file():
            raise UserError(f"bench.against={self.against}: there is no such file; give a bench.json of an earlier run")
