"""Preprocessing of a cohort: every scan in worker processes, then the tables.

Writes OUT/scans.csv (the table that training reads), rejected.csv (rejected scans with the reason), qc.html and
dataset_description.json.
"""

import logging
import os
from collections import Counter
from contextlib import closing, suppress
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from ldae.data.sessions import session_label
from ldae.data.table import write_table
from ldae.preprocessing.job import Job
from ldae.preprocessing.outputs import Record
from ldae.preprocessing.participants import Participant, Participants
from ldae.preprocessing.quality import write_quality_page
from ldae.preprocessing.regions import find_label_maps
from ldae.preprocessing.sources import SourceScan
from ldae.utils.files import write_json
from ldae.utils.process_pool import DIED, DIED_REASON, available_cores, run_in_processes

log = logging.getLogger(__name__)

REJECTED_COLUMNS = ("subject", "session", "path", "reason")
Entry = tuple[SourceScan, Participant, Record]


def preprocess_cohort(
    scans: list[SourceScan],
    participants: Participants,
    job: Job,
    labels: Path | None = None,
    workers: int | None = None,
    threads: int = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """Preprocess `scans` into job.out, write the tables, and return the table of usable scans.

    Scans that an earlier run finished with the same content and parameters are kept. If it is interrupted, the tables
    list the scans that are finished, and the same call continues.

    Args:
        labels: folder of label maps, see `regions.find_label_maps`.
        workers: number of processes; None: one for each core, 0: everything in this process.
        threads: number of threads in each process.

    Raises:
        UserError: the disk is full or cannot be written, or `labels` is ambiguous.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    _write_description(job.out)
    label_maps = find_label_maps(labels) if labels else {}
    sessions = Counter(subject for subject, _ in {(scan.subject, scan.session) for scan in scans})
    found = [participants.look_up(scan, only=sessions[scan.subject] == 1) for scan in scans]
    scans = [_check_session(scan, participant) for scan, participant in zip(scans, found, strict=True)]
    items = [(scan, label_maps.get(_label_map_key(scan))) for scan in scans]
    records: dict[int, Record] = {}

    def write_tables() -> pd.DataFrame:
        return _write_tables(job.out, [(scans[index], found[index], records[index]) for index in sorted(records)])

    try:
        workers = available_cores() if workers is None else workers
        with closing(run_in_processes(job, items, workers, threads, "preprocess", progress=progress)) as results:
            for index, record in results:
                records[index] = _check_record(job, scans[index], record)
    except BaseException:  # interrupted, or the disk is full: what is finished, now or by an earlier run, is usable
        with suppress(OSError):
            unseen = {index: job.find_finished(*item) for index, item in enumerate(items) if index not in records}
            records |= {index: record for index, record in unseen.items() if record}
            write_tables()
        raise
    return write_tables()


def _check_session(scan: SourceScan, participant: Participant) -> SourceScan:
    """`scan`, with a problem if the time of its session is unknown."""
    if participant.months is not None or scan.problem:
        return scan
    problem = (
        f"its session {scan.session!r} is not in months (ses-M012), and sessions.tsv gives neither months nor ages"
    )
    return replace(scan, problem=problem)


def _label_map_key(scan: SourceScan) -> tuple[str, str]:
    return scan.subject.removeprefix("sub-"), scan.session.removeprefix("ses-")


def _check_record(job: Job, scan: SourceScan, record: Record | object) -> Record:
    """The record of a scan, also if its process died; a rejected scan is logged."""
    if record is DIED:
        record = {"status": "rejected", "reason": DIED_REASON, "source": job.relative_source(scan), "files": {}}
    if record["status"] == "rejected":
        log.warning("rejected: %s: %s", scan.path, record["reason"])
    return record


def _write_description(out: Path) -> None:
    description = {
        "Name": "T1w scans prepared by ldae preprocess",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "ldae", "Version": version("ldae")}],
    }
    write_json(out / "dataset_description.json", description)


def _write_tables(out: Path, entries: list[Entry]) -> pd.DataFrame:
    done = [entry for entry in entries if entry[2]["status"] == "done"]
    rejected = [entry for entry in entries if entry[2]["status"] != "done"]
    table = pd.DataFrame([_table_row(out, *entry) for entry in done])
    if done:
        write_table(table, out / "scans.csv")
    else:
        (out / "scans.csv").unlink(missing_ok=True)
    rows = [(scan.subject, scan.session, os.path.abspath(scan.path), record["reason"]) for scan, _, record in rejected]
    write_table(pd.DataFrame(rows, columns=list(REJECTED_COLUMNS), dtype=object), out / "rejected.csv")
    write_quality_page(out, [(scan, record) for scan, _, record in entries])
    log.info("%d scans in %s, %d rejected in %s", len(done), out / "scans.csv", len(rejected), out / "rejected.csv")
    return table


def _table_row(out: Path, scan: SourceScan, participant: Participant, record: Record) -> dict[str, Any]:
    """A row of the table: required columns, measures, region volumes, and further columns of the source."""
    files, folder = record["files"], os.path.abspath(out)
    row = {
        "subject": scan.subject,
        "session": session_label(participant.months or 0),
        "path": os.path.join(folder, files["scan"]),
        "diagnosis": participant.diagnosis,
        "age": participant.age,
        "sex": participant.sex,
    }
    if "labels" in files:
        row["labels_path"] = os.path.join(folder, files["labels"])
    measures = {name: value for name, value in record["measures"].items() if "seconds" not in name}
    metadata = {name: value for name, value in scan.metadata.items() if name not in row}
    return row | measures | record["regions"] | metadata
