"""The tables of a folder of preprocessed scans, made from the records in it: scans.csv, rejected.csv and qc.html.

Every scan's record is a file of its own, so several processes can preprocess into one folder. The tables list every
record, of whichever list of scans, and are the same whatever the order in which the records were written. Records of a
list are left out if the list no longer has the scan (`unlisted`) or was last run with other parameters.
"""

import logging
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from ldae.data.table import read_table, write_table
from ldae.preprocessing.outputs import Record
from ldae.preprocessing.quality import write_quality_page
from ldae.preprocessing.session_scans import Row, SessionScans
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, write_json
from ldae.utils.locks import wait_for_lock

log = logging.getLogger(__name__)

REJECTED_COLUMNS = ("subject", "session", "path", "reason")
LOCK = ".tables.lock"


def write_tables(out: Path, listed_in: str, parameters: str, page: bool = True) -> pd.DataFrame:
    """Write the tables of all records in `out`, and return scans.csv.

    Args:
        listed_in: the list of scans that is preprocessed now, as in its records.
        parameters: key of the parameters that it is preprocessed with, see PreprocessingSteps.key.
        page: whether to write the page for quality control as well.

    Raises:
        UserError: training could not read the table.
    """
    with wait_for_lock(out / LOCK):
        records = [record for record in _read_records(out) if not _is_stale(record, listed_in, parameters)]
        done, duplicates = _drop_duplicates([record for record in records if record["status"] == "done"])
        rejected = [record for record in records if record["status"] != "done"]
        reasons = [_rejected_row(out, record["source"], record, record["reason"]) for record in rejected]
        others = [_rejected_row(out, record["source"], record, reason) for record, reason in duplicates]
        others += [_rejected_row(out, path, record, text) for record in records for path, text in record["left_out"]]
        table = pd.DataFrame([_table_row(out, record) for record in done])
        if done:
            write_table(table, out / "scans.csv")
        else:
            (out / "scans.csv").unlink(missing_ok=True)
        write_table(
            pd.DataFrame(sorted(reasons + others), columns=list(REJECTED_COLUMNS), dtype=object), out / "rejected.csv"
        )
        if page:
            write_quality_page(out, [*done, *rejected])
    if done:
        _check_readable(out / "scans.csv")
        _log_counts(out, done, len(rejected), len(others))
    return table


def _log_counts(out: Path, done: Sequence[Record], num_rejected: int, num_others: int) -> None:
    more = f" and {num_others} not taken" if num_others else ""
    log.info(
        "%d scans in %s, %d rejected%s in %s", len(done), out / "scans.csv", num_rejected, more, out / "rejected.csv"
    )
    lists = {key: record["listed_in"] for record in done if (key := record["key"].lstrip("+").split(":")[0])}
    if len(lists) > 1:
        log.warning("the lists %s in %s were preprocessed with different parameters", " and ".join(lists.values()), out)


def update_records(
    out: Path,
    sessions: Sequence[SessionScans],
    paths: Iterable[Sequence[Path]],
    listed_in: str,
    parameters: str = "",
    is_whole_list: bool = True,
) -> list[bool]:
    """Bring the records of earlier runs up to date with what the tables of participants say now.

    Records of scans that the list no longer has are marked as `unlisted`; their files are kept.

    Args:
        paths: for each session the records that its scans may have.
        parameters: key of the present parameters.
        is_whole_list: whether `sessions` are all of the list; otherwise no record is marked as `unlisted`.

    Returns:
        Whether each session has a record of these parameters.
    """
    current: set[str] = set()
    finished = []
    for session, candidates in zip(sessions, paths, strict=True):
        current.update(path.name for path in candidates)
        is_finished = False
        for path, scan, row in zip(candidates, session.scans, session.rows, strict=True):
            record = _read_record(out / path)
            if record is None:
                continue
            now = record | {"subject": scan.subject, "session": scan.session, "row": row, "listed_in": listed_in}
            now.setdefault("left_out", [])
            now.pop("unlisted", None)
            if now != record:
                write_json(out / path, now)
            is_finished |= _has_parameters(now, parameters)
        finished.append(is_finished)
    for path in _record_files(out) if is_whole_list else ():
        record = None if path.name in current else _read_record(path)
        if record and record.get("listed_in") == listed_in and not record.get("unlisted"):
            write_json(path, record | {"unlisted": True})
    return finished


def _read_records(out: Path) -> list[Record]:
    """Records that have what the tables need, sorted by subject, time, session and file."""
    found = [record for path in _record_files(out) if (record := _read_record(path))]
    found = [record for record in found if all((out / file).is_file() for file in record["files"].values())]
    records = [record for record in found if "row" in record]
    if len(found) > len(records):
        log.warning(
            "%d records in %s are of an earlier version and in no table: preprocess the folder or list that they came "
            "from once more; finished scans are kept",
            len(found) - len(records),
            out / "records",
        )
    return sorted(records, key=lambda record: (*_place(record), record["session"], record["source"]))


def _read_record(path: Path) -> Record | None:
    with suppress(OSError, ValueError):
        return read_json(path)
    return None


def _record_files(out: Path) -> list[Path]:
    return sorted((out / "records").glob("*.json"))


def _is_stale(record: Record, listed_in: str, parameters: str) -> bool:
    """Whether a record is of a scan that its list no longer has, or of earlier parameters of the present list."""
    is_of_other_parameters = record["listed_in"] == listed_in and not _has_parameters(record, parameters)
    return bool(record.get("unlisted") or is_of_other_parameters)


def _has_parameters(record: Record, parameters: str) -> bool:
    """Whether a scan was preprocessed with these parameters, or could not be read with any."""
    key = record.get("key", "")
    return not key or key.lstrip("+").startswith(parameters)


def _place(record: Record) -> tuple[str, str]:
    return record["subject"], record["row"].get("session", "")


def _drop_duplicates(records: list[Record]) -> tuple[list[Record], list[tuple[Record, str]]]:
    """The first scan of each subject and month, and the others, which came from other lists, with the reason."""
    kept: dict[tuple[str, str], Record] = {}
    dropped = []
    for record in records:
        first = kept.setdefault(_place(record), record)
        if first is not record:
            dropped.append((record, f"not taken: its subject has a scan in this month already ({first['source']})"))
    return list(kept.values()), dropped


def _rejected_row(out: Path, source: str, record: Record, reason: str) -> tuple[str, str, str, str]:
    return record["subject"], record["session"], os.path.abspath(out / source), reason


def _table_row(out: Path, record: Record) -> Row:
    """A row of the table: required columns, measures, region volumes, and further columns of the source."""
    files, folder, cells = record["files"], os.path.abspath(out), dict(record["row"])
    row: dict[str, Any] = {
        "subject": record["subject"],
        "session": cells.pop("session"),
        "path": os.path.join(folder, files["scan"]),
        "diagnosis": cells.pop("diagnosis"),
        "age": math.nan if cells["age"] is None else cells["age"],
        "sex": cells.pop("sex"),
    }
    if "labels" in files:
        row["labels_path"] = os.path.join(folder, files["labels"])
    measures = {name: value for name, value in record["measures"].items() if "seconds" not in name}
    return row | measures | record["regions"] | {name: cell for name, cell in cells.items() if name not in row}


def _check_readable(path: Path) -> None:
    try:
        read_table(path, log_columns=False)
    except UserError as error:
        raise UserError(f"training cannot read the table: {error}") from error
