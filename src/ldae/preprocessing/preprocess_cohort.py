"""Preprocessing of a cohort: one scan of every session in worker processes, then the tables.

Writes OUT/scans.csv (the table that training reads), rejected.csv (rejected scans with the reason), qc.html and
dataset_description.json. Several jobs can share a cohort (`Shard`): each preprocesses its sessions, and the last one
makes the tables from the records of all.
"""

import logging
from collections.abc import Sequence
from contextlib import closing, suppress
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from ldae.preprocessing.cohort_plan import CohortPlan, plan_cohort
from ldae.preprocessing.cohort_tables import update_records, write_tables
from ldae.preprocessing.job import Job
from ldae.preprocessing.outputs import Record
from ldae.preprocessing.participants import Participants
from ldae.preprocessing.session_scans import SessionScans
from ldae.preprocessing.sources import SourceScan
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, write_json
from ldae.utils.process_pool import DIED, DIED_REASON, available_cores, ignoring_interrupts, run_in_processes
from ldae.utils.shards import Shard, remove_marks

log = logging.getLogger(__name__)

DESCRIPTION = "dataset_description.json"
MARKS = ".shards"  # folder of the marks of finished shards


def preprocess_cohort(
    scans: Sequence[SourceScan],
    participants: Participants,
    job: Job,
    labels: Path | None = None,
    workers: int | None = None,
    threads: int = 1,
    progress: bool = True,
    shard: Shard | None = None,
) -> pd.DataFrame | None:
    """Preprocess `scans` into job.out, write the tables, and return the table of all usable scans in job.out.

    Scans that an earlier run finished with the same content and parameters are kept. If it is interrupted, the tables
    list the scans that are finished, and the same call continues.

    Args:
        labels: folder of label maps, see `regions.find_label_maps`.
        workers: number of processes; None: one for each core, 0: everything in this process.
        threads: number of threads in each process.
        shard: the part of the sessions that this job does, while other jobs do the others. The last job writes the
            tables; the others return None.

    Raises:
        UserError: the disk is full or cannot be written, `labels` is ambiguous, or none of the scans is usable.
    """
    whole = plan_cohort(scans, participants, job, labels)
    job.out.mkdir(parents=True, exist_ok=True)
    _write_description(job.out)
    plan = (whole if shard is None else whole.part_of(shard)).without_foreign(job)
    update_records(job.out, plan.sessions, plan.record_paths(job), job.listed_in, is_whole_list=shard is None)
    _reject_unusable(plan, job)
    parameters = job.steps.key()
    try:
        reasons = _preprocess_sessions(plan.sessions, job, workers, threads, progress)
    except BaseException:  # interrupted, or the disk is full: what is finished, now or by an earlier run, is usable
        if shard is None:
            with ignoring_interrupts(), suppress(OSError, UserError):
                write_tables(job.out, job.listed_in, parameters, page=False)
        raise
    if shard is not None:
        if shard.mark_finished(job.out / MARKS, whole.digest(job)):
            return merge_tables(whole, job)
        log.info("shard %s is finished; the last shard, or --merge, writes the tables in %s", shard, job.out)
        return None
    table = write_tables(job.out, job.listed_in, parameters)
    if len(reasons) == len(plan.sessions):
        reasons = [session.first.problem for session in plan.unusable] + reasons
        raise UserError(f"none of the {len(scans)} scans is usable ({reasons[0]}): see {job.out / 'rejected.csv'}")
    return table


def merge_tables(plan: CohortPlan, job: Job) -> pd.DataFrame:
    """Write the tables of what several jobs have preprocessed, and return the table of all usable scans in job.out.

    Raises:
        UserError: some sessions of `plan` are not preprocessed yet, or none is usable. The tables are written in any
            case and list what is finished.
    """
    plan, parameters = plan.without_foreign(job), job.steps.key()
    has_record = update_records(job.out, plan.sessions, plan.record_paths(job), job.listed_in, parameters)
    _reject_unusable(plan, job)
    table = write_tables(job.out, job.listed_in, parameters)
    missing = [session for session, has in zip(plan.sessions, has_record, strict=True) if not has]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(plan.sessions)} scans are not preprocessed yet (the first: "
            f"{missing[0].first.printable_path}): run their shards again; the tables in {job.out} list the others"
        )
    if table.empty:
        raise UserError(f"none of the scans is usable: see {job.out / 'rejected.csv'}")
    remove_marks(job.out / MARKS)
    return table


def _preprocess_sessions(
    sessions: Sequence[SessionScans], job: Job, workers: int | None, threads: int, progress: bool
) -> list[str]:
    """Preprocess sessions in worker processes. Returns the reasons of those that are rejected."""
    reasons: list[str] = []
    workers = available_cores() if workers is None else workers
    items = [(session,) for session in sessions]
    with closing(run_in_processes(job, items, workers, threads, "preprocess", progress=progress)) as results:
        for index, record in results:
            if record is DIED:
                record = job.reject(sessions[index], DIED_REASON)
            _log_record(sessions[index], record)
            reasons += [record["reason"]] if record["status"] != "done" else []
    return reasons


def _reject_unusable(plan: CohortPlan, job: Job) -> None:
    for session in plan.unusable:
        _log_record(session, job.reject(session, session.first.problem))


def _log_record(session: SessionScans, record: Record) -> None:
    """Log a rejected scan, scans that were not taken, and remarks."""
    if record["status"] == "rejected":
        log.warning("rejected: %s: %s", session.first.printable_path, record["reason"])
    for source, reason in record["left_out"]:
        log.warning("%s: %s", Path(source).name, reason)
    for note in record.get("notes", ()):
        log.warning("%s: %s", session.first.printable_path, note)


def _write_description(out: Path) -> None:
    """Write dataset_description.json, unless the folder has that of another program."""
    path = out / DESCRIPTION
    description = {
        "Name": "T1w scans prepared by ldae preprocess",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "ldae", "Version": version("ldae")}],
    }
    if path.exists():
        try:
            generated_by = read_json(path).get("GeneratedBy", [])
            is_ours = any(tool.get("Name") == "ldae" for tool in generated_by)
        except (ValueError, AttributeError):
            is_ours = False
        if not is_ours:
            return
    write_json(path, description)
