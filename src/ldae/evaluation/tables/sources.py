"""What tables are made of: the stored metrics of a run, of its siblings and of the bench, and the seconds of training.

Nothing is computed here that an evaluation has computed. Metrics count only if they belong to the present weights.
"""

import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ldae.evaluation.other_cohort import EXTERNAL
from ldae.runs import Run, Workspace
from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256, read_json
from ldae.utils.results_record import METRICS, read_metrics_of, read_record

log = logging.getLogger(__name__)

STAGES = {"aekl": "autoencoder", "pretrain": "U-Net", "repr": "encoder and gradient estimator"}
IDENTITY = "IdentityAutoencoder"  # the class of the autoencoder of a run in voxel space
BENCH = Path("bench") / "bench.json"  # below the folder of runs
CHOICE = ("evaluation=", "evaluation.")  # overrides that choose evaluations, and that are put in place of others


@dataclass(frozen=True)
class Measured:
    """A run with the metrics that belong to its weights.

    Attributes:
        weights: SHA-256 of each network.
        split_hash: of the split by subject.
        in_voxel_space: whether its diffusion works on voxels instead of latents.
        arguments: overrides with which it was evaluated; empty if no record has them.
    """

    name: str
    metrics: Mapping[str, float]
    weights: Mapping[str, str]
    split_hash: str
    in_voxel_space: bool = False
    arguments: Sequence[str] = ()

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the run in `folder`, runs/NAME.

        Raises:
            UserError: it is not trained, or damaged.
        """
        space = Workspace(folder)
        runs = [space.predecessor(stage) for stage in STAGES]
        weights = {name: entry["sha256"] for run in runs for name, entry in run.metadata["weights"].items()}
        metrics, _ = read_metrics_of(space.evaluation, weights)
        target = str(runs[-1].config.model.autoencoder.get("_target_", ""))
        return cls(
            folder.name, metrics, weights, str(runs[-1].metadata.get("split_hash")), target.endswith(IDENTITY),
            find_arguments(space.evaluation, folder.name),
        )  # fmt: skip

    def command(self, *evaluations: str) -> str:
        """The command that runs these evaluations of this run."""
        return shlex.join(["python", "evaluate.py", *self.arguments, f"evaluation=[{','.join(evaluations)}]"])

    def train_command(self, *choices: str) -> str:
        """The command that trains a stage of this run, given what chooses it."""
        return shlex.join(["python", "train.py", *choices, *self.arguments])


@dataclass(frozen=True)
class Sources:
    """Everything that the tables of one run are made of.

    Attributes:
        siblings: other runs of the same split by subject that have been evaluated.
        bench: numbers of bench.json; empty without one.
        seconds: wall seconds of each stage's training loop, as far as its logs are there.
        identity: SHA-256 of metrics.json, which the tables name.
    """

    run: Measured
    siblings: Sequence[Measured] = ()
    bench: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    identity: str = ""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the run in `folder`, runs/NAME, and its neighbours.

        Raises:
            UserError: there is no such run, or nothing of it was evaluated.
        """
        if not folder.is_dir():
            raise UserError(f"there is no run {folder}: give the name of a run in --runs")
        run, stored = Measured.read(folder), folder / "evaluation" / METRICS
        if not run.metrics:
            raise UserError(f"{folder} has no metrics of its present weights: run `{run.command('probes')}` first")
        seconds = {stage: find_training_seconds(Workspace(folder).stage(stage)) for stage in STAGES}
        known = {stage: found for stage, found in seconds.items() if found is not None}
        return cls(run, find_siblings(folder, run), read_bench(folder.parent), known, file_sha256(stored))

    @property
    def voxel_twins(self) -> list[Measured]:
        """Siblings that work in voxel space."""
        return [] if self.run.in_voxel_space else [sibling for sibling in self.siblings if sibling.in_voxel_space]


def find_arguments(evaluation: Path, name: str) -> list[str]:
    """The overrides with which a run was last evaluated by evaluate.py, without the choice of evaluations."""
    for entry, results in reversed(read_record(evaluation).items()):
        words = shlex.split(results.command)
        if words[:2] == ["python", "evaluate.py"] and entry.split("/")[0] != EXTERNAL:
            return [word for word in words[2:] if not word.startswith(CHOICE)]
    return [f"name={name}"]


def find_siblings(folder: Path, run: Measured) -> list[Measured]:
    """Other trained and evaluated runs beside `folder` that were trained on the same split, by name."""
    found = []
    for other in sorted(folder.parent.iterdir()):
        if other == folder or not (other / "evaluation" / METRICS).is_file() or not Run(other / "repr").published:
            continue
        try:
            sibling = Measured.read(other)
        except UserError as error:
            log.warning("%s is left out: %s", other, error)
            continue
        if sibling.split_hash == run.split_hash and sibling.metrics:
            found.append(sibling)
    return found


def read_bench(runs: Path) -> dict[str, float]:
    """The numbers of runs/bench/bench.json; none if there is no such file.

    Raises:
        UserError: it is damaged.
    """
    path = runs / BENCH
    if not path.is_file():
        return {}
    try:
        return {str(name): float(value) for name, value in read_json(path).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, or run `make bench` again") from error


def find_training_seconds(run: Run) -> float | None:
    """Wall seconds of a stage's training loop over all its starts; None if they are not known.

    From its record of progress; of a run of an earlier version, which has none, from the times in its TensorBoard
    files, of which each start has written one.
    """
    if run.progress:
        return run.progress["seconds"]
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    total, files = 0.0, sorted((run.path / "tensorboard").glob("events.out.tfevents.*"))
    for file in files:
        times = [event.wall_time for event in EventFileLoader(str(file)).Load()]
        total += max(times) - min(times) if times else 0.0
    return total if files else None
