"""A table of y that several jobs compute: every scan's result is its own file, and the last job makes the table."""

import csv
import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldae.utils.errors import UserError
from ldae.utils.files import read_json, replacing, write_json
from ldae.utils.locks import lock_of, wait_for_lock
from ldae.utils.resumable_csv import format_row, read_rows, write_rows
from ldae.utils.shards import Shard

Rejected = list[tuple[str, str]]  # path and reason
Record = dict[str, Any]  # identity of the model, and either the cells of a row or the reason of a rejection


def rejected_path(output: Path) -> Path:
    """The table of rejected scans beside the table of y."""
    return output.with_name(f"{output.stem}_rejected.csv")


def read_rejected(output: Path) -> Rejected:
    """The scans that an earlier run rejected."""
    with suppress(OSError, UnicodeError), open(rejected_path(output), newline="", encoding="utf-8") as handle:
        return [(row[0], row[1]) for row in csv.reader(handle) if len(row) == 2][1:]
    return []


def write_rejected(output: Path, rejected: Rejected) -> None:
    """Write the table of rejected scans, or remove an earlier one if no scan was rejected."""
    path = rejected_path(output)
    if not rejected:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([("path", "reason"), *rejected])


class ShardedTable:
    """The results that will become the table at `output`. They are in a folder beside it until the table is made."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._folder = output.with_name(f"{output.stem}_shards")

    def open(self, columns: Sequence[str]) -> dict[str, str]:
        """Key of each path in the table that an earlier run wrote.

        Raises:
            UserError: the file at `output` is not a table with these columns.
        """
        return {path: row[1] for path, row in read_rows(self._output, columns).items()}

    def has(self, path: Path, key: str) -> bool:
        """Whether there is a result of this key."""
        record = self._read(path)
        return record is not None and bool(record["cells"]) and record["cells"][1] == key

    def add(self, path: Path, key: str, identity: str, values: Sequence[float]) -> None:
        """Write y of a scan."""
        write_json(self._record(path), {"identity": identity, "cells": format_row(path, key, values), "reason": ""})

    def reject(self, path: Path, identity: str, reason: str) -> None:
        """Write why a scan cannot be used."""
        write_json(self._record(path), {"identity": identity, "cells": [], "reason": reason})

    def mark_finished(self, shard: Shard, paths: Sequence[Path], identity: str) -> bool:
        """Mark a shard of `paths` as finished, and return whether all are."""
        work = hashlib.sha256("\0".join([identity, *map(str, paths)]).encode(errors="surrogateescape"))
        return shard.mark_finished(self._folder, work.hexdigest()[:16])

    def merge(self, paths: Sequence[Path]) -> Rejected:
        """Write the table: first rows of other scans that it has already, then the results of `paths` in their order.

        Returns:
            The scans of `paths` that were rejected.

        Raises:
            UserError: no shard has run, the results are of several models, or some are missing; the table then has
                what is finished.
        """
        if not self._folder.is_dir() and not self._output.exists():
            raise UserError(f"there are no results for {self._output}: run the shards first")
        with wait_for_lock(lock_of(self._output)):
            records = {str(path): self._read(path) for path in paths}
            found = [record for record in records.values() if record]
            if len({record["identity"] for record in found}) > 1:
                raise UserError(f"{self._folder} has results of several models: give all shards the same one")
            count = next((len(record["cells"]) - 2 for record in found if record["cells"]), None)
            rows = self._merge_rows(records, count)
            reasons = dict(read_rejected(self._output))  # of an earlier run
            reasons = {path: reasons[path] for path in records if path in reasons and path not in rows}
            reasons |= {path: record["reason"] for path, record in records.items() if record and record["reason"]}
            missing = [path for path, rec in records.items() if not (rec or path in rows or path in reasons)]
            if missing:
                raise UserError(
                    f"{len(missing)} of {len(paths)} scans are not embedded yet (the first: {missing[0]}): run their "
                    f"shards again; {self._output} has the others"
                )
            shutil.rmtree(self._folder, ignore_errors=True)
        return [(path, reasons[path]) for path in records if path in reasons]

    def _merge_rows(self, records: dict[str, Record | None], count: int | None) -> dict[str, list[str]]:
        """Write the table with `count` numbers in a row, if there are new rows. Returns all rows by their path."""
        columns = self._columns() if count is None else [f"y{index:03d}" for index in range(count)]
        rows = read_rows(self._output, columns)
        if count is not None:
            found = {path: rows.pop(path, []) for path in records}
            found |= {path: record["cells"] for path, record in records.items() if record and record["cells"]}
            rows |= {path: found[path] for path in records if found[path]}
            write_rows(self._output, columns, rows.values())
        return rows

    def _columns(self) -> list[str]:
        """Names of the numbers in the table that exists."""
        with suppress(OSError, UnicodeError), open(self._output, encoding="utf-8") as file:
            return file.readline().rstrip("\n").split(",")[2:]
        return []

    def _record(self, path: Path) -> Path:
        return self._folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"

    def _read(self, path: Path) -> Record | None:
        with suppress(OSError, ValueError):
            return read_json(self._record(path))
        return None
