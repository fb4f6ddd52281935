"""Preprocessing of a cohort: one scan of every session in worker processes, then the tables.

Writes OUT/scans.csv (the table that training reads), rejected.csv (rejected scans with the reason), qc.html and
dataset_description.json.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pandas as pd

from ldae.data.columns import find_columns
from ldae.data.sessions import session_label
from ldae.preprocessing.cohort_tables import update_records, write_tables
from ldae.preprocessing.job import Job
from ldae.preprocessing.outputs import Record
from ldae.preprocessing.participants import Participant, Participants
from ldae.preprocessing.regions import find_label_maps, label_map_of
from ldae.preprocessing.session_scans import Row, SessionScans, group_scans
from ldae.preprocessing.sources import SourceScan
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, write_json
from ldae.utils.process_pool import DIED, DIED_REASON, available_cores, ignoring_interrupts, run_in_processes

log = logging.getLogger(__name__)

DESCRIPTION = "dataset_description.json"
# Contents of columns that have a place of their own in the table; other columns of the source are copied to it.
PLACED_ROLES = ("subject", "session", "path", "diagnosis", "age", "sex")


def preprocess_cohort(
    scans: Sequence[SourceScan],
    participants: Participants,
    job: Job,
    labels: Path | None = None,
    workers: int | None = None,
    threads: int = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """Preprocess `scans` into job.out, write the tables, and return the table of all usable scans in job.out.

    Scans that an earlier run finished with the same content and parameters are kept. If it is interrupted, the tables
    list the scans that are finished, and the same call continues.

    Args:
        labels: folder of label maps, see `regions.find_label_maps`.
        workers: number of processes; None: one for each core, 0: everything in this process.
        threads: number of threads in each process.

    Raises:
        UserError: the disk is full or cannot be written, `labels` is ambiguous, or none of the scans is usable.
    """
    label_maps = find_label_maps(labels) if labels else {}
    sessions, unusable = _plan(scans, participants, job, label_maps)
    job.out.mkdir(parents=True, exist_ok=True)
    _write_description(job.out)
    sessions, foreign = _separate_foreign(job, sessions)
    unusable += foreign
    names = [[job.outputs(scan).names.record for scan in session.scans] for session in sessions]
    update_records(job.out, sessions, names, job.listed_in)
    for session in unusable:
        _log_record(session, job.reject(session, session.first.problem))
    parameters = job.steps.key()
    reasons: list[str] = []
    try:
        workers = available_cores() if workers is None else workers
        items = [(session,) for session in sessions]
        with closing(run_in_processes(job, items, workers, threads, "preprocess", progress=progress)) as results:
            for index, record in results:
                if record is DIED:
                    record = job.reject(sessions[index], DIED_REASON)
                _log_record(sessions[index], record)
                reasons += [record["reason"]] if record["status"] != "done" else []
    except BaseException:  # interrupted, or the disk is full: what is finished, now or by an earlier run, is usable
        with ignoring_interrupts(), suppress(OSError, UserError):
            write_tables(job.out, job.listed_in, parameters, page=False)
        raise
    table = write_tables(job.out, job.listed_in, parameters)
    if len(reasons) == len(sessions):
        reasons = [session.first.problem for session in unusable] + reasons
        raise UserError(f"none of the {len(scans)} scans is usable ({reasons[0]}): see {job.out / 'rejected.csv'}")
    return table


def _plan(
    scans: Sequence[SourceScan], participants: Participants, job: Job, label_maps: dict[tuple[str, str], Path]
) -> tuple[list[SessionScans], list[SessionScans]]:
    """The sessions to preprocess, and the scans that cannot be used, each in a session of its own."""
    problems = [scan for scan in scans if scan.problem]
    scans = [scan for scan in scans if not scan.problem]
    found = participants.look_up_all(scans)
    usable, rows = [], []
    for scan, participant in zip(scans, found, strict=True):
        if participant.problem:
            problems.append(replace(scan, problem=participant.problem))
        else:
            usable.append(scan)
            rows.append(_row(scan, participant))
    sessions = group_scans(usable, rows, job.choice, lambda scan: label_map_of(scan, label_maps))
    return sessions, [SessionScans((scan,)) for scan in problems]


def _row(scan: SourceScan, participant: Participant) -> Row:
    """The cells of the table that do not depend on preprocessing."""
    placed = {name for role in PLACED_ROLES for name in find_columns(list(scan.metadata), role)}
    return {
        "session": session_label(participant.months or 0),
        "diagnosis": participant.diagnosis,
        "age": participant.age if math.isfinite(participant.age) else None,
        "sex": participant.sex,
        **{name: cell for name, cell in scan.metadata.items() if name not in placed},
    }


def _separate_foreign(job: Job, sessions: list[SessionScans]) -> tuple[list[SessionScans], list[SessionScans]]:
    """The sessions whose names are free in `job.out`, and those of which another list has put another scan there."""
    free, foreign = [], []
    for session in sessions:
        other = job.find_foreign(session)
        if other is None:
            free.append(session)
            continue
        problem = (
            f"{job.out} has another scan of {session.first.subject} {session.first.session}".rstrip()
            + f" from {other['listed_in']}: choose another output folder, or remove that scan's record"
        )
        foreign.append(SessionScans((replace(session.first, problem=problem),)))
    return free, foreign


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
