"""`ldae preprocess --launcher slurm`: submits the shards of a preprocessing as an array of jobs."""

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldae.commands.preprocess_folder import prepare_folder, preprocess_folder
from ldae.utils.errors import UserError
from ldae.utils.shards import Shard

if TYPE_CHECKING:
    from submitit import Executor, Job
    from submitit.helpers import DelayedSubmission

log = logging.getLogger(__name__)

SCANS_PER_JOB = 100
MAX_JOBS = 1000  # Slurm's default limit of an array is 1001
LOGS = ".submitit"  # folder of the jobs' logs, in the output folder
TABLES = (
    "the last job writes the tables. If a job is lost, the same command continues; --merge in place of --launcher "
    "writes the tables of what is finished"
)
# Settings that every cluster has; the others are Slurm's.
COMMON = ("name", "nodes", "tasks_per_node", "cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min")

Arguments = tuple[tuple[str, ...], dict[str, Any]]  # overrides, and further arguments of `preprocess_folder`


@dataclass
class LauncherSettings:
    """What a job asks for. The names are those of conf/hydra/launcher/slurm.yaml, the values are for CPUs alone."""

    name: str = "ldae-preprocess"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int = 8
    mem_gb: float = 24.0
    timeout_min: int = 1440
    array_parallelism: int = 256
    signal_delay_s: int = 120  # seconds before the time limit
    max_num_timeout: int = 20  # how often a job may be queued again at its time limit
    additional_parameters: dict[str, Any] = field(default_factory=lambda: {"requeue": True})
    setup: list[str] | None = None


@dataclass(frozen=True)
class PreprocessingJob:
    """One shard. It is sent to a machine of the cluster, where it is called without arguments."""

    source: Path
    out: Path
    arguments: Arguments
    shard: Shard

    def __call__(self) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        overrides, others = self.arguments
        preprocess_folder(self.source, self.out, overrides, **others, shard=self.shard)

    def checkpoint(self) -> "DelayedSubmission":
        """What is queued after pre-emption or at the time limit: the same shard, which keeps its finished scans."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def launch_preprocessing(
    source: Path,
    out: Path,
    arguments: Arguments,
    launcher: str,
    shards: int | None = None,
    settings: Sequence[str] = (),
    wait: bool = True,
) -> None:
    """Submit the shards of a preprocessing; the last of them to finish writes the tables.

    Args:
        launcher: "slurm", or "local" for processes on this machine, which are waited for in any case.
        shards: number of jobs; None: one per SCANS_PER_JOB scans.
        settings: values of LauncherSettings as launcher.KEY=VALUE.
        wait: whether to wait until all jobs have ended.

    Raises:
        UserError: submitit is not installed or finds no Slurm, a setting is unknown, see `preprocess_folder`, or a job
            failed.
    """
    from ldae.preprocessing.cohort_plan import plan_cohort

    values = parse_settings(settings)
    overrides, others = arguments
    source, out = source.absolute(), out.absolute()  # jobs may start in another folder
    others = others | {name: others[name] and others[name].absolute() for name in ("labels", "participants")}
    check_submitit()
    scans, participants, job = prepare_folder(source, out, overrides, others["participants"], others["run"])
    plan_cohort(scans, participants, job, others["labels"])  # finds mistakes before anything is submitted
    count = shards or min(MAX_JOBS, -(-len(scans) // SCANS_PER_JOB))
    executor = _make_executor(out / LOGS, launcher, values)
    works = [PreprocessingJob(source, out, (overrides, others), Shard(index, count)) for index in range(count)]
    with executor.batch():
        jobs = [executor.submit(work) for work in works]
    log.info("%d jobs submitted, the first: %s; logs in %s", count, jobs[0].job_id, out / LOGS)
    if launcher == "slurm" and not wait:
        log.info(TABLES)
        return
    try:
        _wait_for(jobs)
    except KeyboardInterrupt:
        log.warning("jobs in Slurm go on: %s", TABLES)
        raise


def parse_settings(settings: Sequence[str]) -> LauncherSettings:
    """LauncherSettings with values changed by launcher.KEY=VALUE.

    Raises:
        UserError: a key is unknown, or a value is of another type.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        dotlist = OmegaConf.from_dotlist([text.removeprefix("launcher.") for text in settings])
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LauncherSettings), dotlist))
    except OmegaConfBaseException as error:
        known = ", ".join(asdict(LauncherSettings()))
        reason = str(error).splitlines()[0]
        raise UserError(f"{' '.join(settings)}: {reason}; the keys of launcher are {known}") from error


def check_submitit() -> None:
    """Refuse to launch without submitit.

    Raises:
        UserError: it is not installed.
    """
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise UserError("--launcher needs submitit: pip install 'ldae[cluster]'") from error


def _make_executor(folder: Path, launcher: str, values: LauncherSettings) -> "Executor":
    from submitit import AutoExecutor

    given = {name: value for name, value in asdict(values).items() if value is not None}
    retries = given.pop("max_num_timeout")
    common = {name: given.pop(name) for name in COMMON if name in given}
    try:
        executor = AutoExecutor(folder=folder, cluster=launcher, slurm_max_num_timeout=retries)
    except RuntimeError as error:
        raise UserError(
            f"--launcher {launcher}: {error}; submit on a machine with sbatch, or use --shard I/N"
        ) from error
    executor.update_parameters(**common, **{f"slurm_{name}": value for name, value in given.items()})
    return executor


def _wait_for(jobs: "Sequence[Job[None]]") -> None:
    """Wait until all jobs have ended.

    Raises:
        UserError: a job failed.
    """
    from submitit.core.utils import FailedJobError, UncompletedJobError

    failed: list[tuple[Job[None], str]] = []
    for job in jobs:
        try:
            job.result()
        except (FailedJobError, UncompletedJobError) as error:
            errors = re.findall(r"^[\w.]*(?:Error|Exception|Exit): (.+)", str(error), re.MULTILINE)  # of its traceback
            failed.append((job, errors[-1] if errors else "it did not end by itself"))
    if failed:
        job, reason = failed[0]
        raise UserError(
            f"{len(failed)} of {len(jobs)} jobs failed ({reason}): see {job.paths.stderr}; the same command continues"
        )
