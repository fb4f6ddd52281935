"""A cohort: every scan through the job, and the tables of what came of it.

OUT/scans.csv (what training takes), rejected.csv (what was set aside, and why), qc.html, dataset_description.json
"""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pandas as pd

from ldae.data.table import session_label, write_table
from ldae.preprocessing.job import Job, Record
from ldae.preprocessing.participants import Participant, Participants
from ldae.preprocessing.quality import write_quality_page
from ldae.preprocessing.regions import find_label_maps
from ldae.preprocessing.sources import SourceScan
from ldae.utils.files import write_json
from ldae.utils.process_pool import DIED, DIED_REASON, available_cores, run_in_processes

log = logging.getLogger(__name__)

REJECTED = ("subject", "session", "path", "reason")
Entry = tuple[SourceScan, Participant, Record]


def preprocess_cohort(
    scans: list[SourceScan],
    people: Participants,
    job: Job,
    labels: Path | None = None,
    workers: int | None = None,
    threads: int = 1,
    progress: bool = True,
) -> pd.DataFrame:
    """Prepare `scans` into job.out and write the tables; the table of usable scans.

    What an earlier run did under the same content and parameters is kept. Interrupted, it leaves tables of what is
    done, and the same call goes on.

    Args:
        labels: folder of label maps, see `regions.find_label_maps`.
        workers: processes; default: one a core.
        threads: of each process.

    Raises:
        UserError: the disk is full or cannot be written, or `labels` is ambiguous.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    _describe(job.out)
    maps = find_label_maps(labels) if labels else {}
    sessions = Counter(scan.subject for scan in {(s.subject, s.session): s for s in scans}.values())
    persons = [people.look_up(scan, only=sessions[scan.subject] == 1) for scan in scans]
    calls = [(_timed(scan, person), maps.get(_bare(scan))) for scan, person in zip(scans, persons, strict=True)]
    workers = available_cores() if workers is None else workers
    records: dict[int, Record] = {}
    try:
        with closing(run_in_processes(job, calls, workers, threads, "preprocess", progress=progress)) as results:
            for index, record in results:
                records[index] = _died(job, scans[index]) if record is DIED else record
                if records[index]["status"] == "rejected":
                    log.warning("set aside: %s: %s", scans[index].path, records[index]["reason"])
    except BaseException:
        # Interrupted, or the disk is full: what is done, in this run or an earlier one, is usable.
        with suppress(OSError):
            records |= {
                i: found for i, call in enumerate(calls) if i not in records and (found := job.find_finished(*call))
            }
            _write(job.out, [(scans[index], persons[index], records[index]) for index in sorted(records)])
        raise
    return _write(job.out, [(scans[index], persons[index], records[index]) for index in range(len(scans))])


def _timed(scan: SourceScan, person: Participant) -> SourceScan:
    """`scan` with a problem where no one knows when it was made."""
    if person.months is not None or scan.problem:
        return scan
    problem = (
        f"its session {scan.session!r} is not in months (ses-M012), and sessions.tsv gives neither months nor ages"
    )
    return SourceScan(scan.path, scan.subject, scan.session, scan.metadata, problem)


def _bare(scan: SourceScan) -> tuple[str, str]:
    return scan.subject.removeprefix("sub-"), scan.session.removeprefix("ses-")


def _died(job: Job, scan: SourceScan) -> Record:
    return {"status": "rejected", "reason": DIED_REASON, "source": job.relative_source(scan), "files": {}}


def _describe(out: Path) -> None:
    from importlib.metadata import version

    about = {"Name": "T1w scans prepared by ldae preprocess", "BIDSVersion": "1.9.0", "DatasetType": "derivative"}
    write_json(
        out / "dataset_description.json", about | {"GeneratedBy": [{"Name": "ldae", "Version": version("ldae")}]}
    )


def _write(out: Path, entries: list[Entry]) -> pd.DataFrame:
    done = [entry for entry in entries if entry[2]["status"] == "done"]
    table = pd.DataFrame([_row(out, *entry) for entry in done])
    if done:
        write_table(table, out / "scans.csv")
    else:
        (out / "scans.csv").unlink(missing_ok=True)
    rejected = [entry for entry in entries if entry[2]["status"] != "done"]
    _write_rejected(out / "rejected.csv", rejected)
    write_quality_page(out, [(scan, record) for scan, _, record in entries])
    log.info("%d scans in %s, %d set aside in %s", len(done), out / "scans.csv", len(rejected), out / "rejected.csv")
    return table


def _row(out: Path, scan: SourceScan, person: Participant, record: Record) -> dict[str, Any]:
    """A line of the table: what is required, what was measured, what the source says beside it."""
    files, folder = record["files"], os.path.abspath(out)
    row = {
        "subject": scan.subject,
        "session": session_label(person.months or 0),
        "path": os.path.join(folder, files["scan"]),
        "diagnosis": person.diagnosis,
        "age": person.age,
        "sex": person.sex,
    }
    if "labels" in files:
        row["labels_path"] = os.path.join(folder, files["labels"])
    measures = {name: value for name, value in record["measures"].items() if "seconds" not in name}
    extra = {name: value for name, value in scan.metadata.items() if name not in row}
    return row | measures | record["regions"] | extra


def _write_rejected(path: Path, entries: Iterable[Entry]) -> None:
    rows = [(scan.subject, scan.session, os.path.abspath(scan.path), record["reason"]) for scan, _, record in entries]
    write_table(pd.DataFrame(rows, columns=list(REJECTED), dtype=object), path)
