"""Preprocessing of one session, from its scan to the files below the output folder.

The record of a scan is written last and marks it as finished. It contains a key computed from the scan's content and
all parameters: as long as the key is the same, the scan is not preprocessed again.
"""

import errno
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from ldae.data.nifti import READING, BadScan, find_partner, is_read_as_before, reason_missing, states_orientation
from ldae.preprocessing.bids_names import BidsNames
from ldae.preprocessing.outputs import Outputs, Record
from ldae.preprocessing.regions import Regions
from ldae.preprocessing.session_scans import FIRST, RunChoice, SessionScans, describe_choice, quality
from ldae.preprocessing.sources import SourceScan
from ldae.preprocessing.steps import PreprocessedScan, PreprocessingSteps
from ldae.preprocessing.template import template_brain
from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256, remove_temporaries
from ldae.utils.locks import wait_for_lock

# Errors of the disk, which stop the whole run; other errors concern one scan.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EIO}

LOCKS = ".locks"  # folder of locks, for jobs that write into one output folder


@dataclass(frozen=True)
class Job:
    """Preprocesses one scan of a session; it is sent to the worker processes.

    Attributes:
        steps: the steps and their parameters.
        out: output folder.
        regions: volumes to measure in label maps, or None.
        choice: which scan of a session is taken if it has several.
        listed_in: where the scans were listed, relative to `out`; it is kept in the records.
    """

    steps: PreprocessingSteps
    out: Path
    regions: Regions | None = None
    choice: RunChoice = FIRST
    listed_in: str = ""

    def __call__(self, session: SessionScans) -> Record:
        """Preprocess a session, with its label map if there is one, and return its record.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        with _stop_on_disk_errors(self.out):
            keys, reasons = self._read_keys(session)
            return self._read_finished(session, _join_keys(keys)) or self._preprocess(session, keys, reasons)

    def find_foreign(self, session: SessionScans) -> Record | None:
        """The record of another list of scans under the name of one of these, if its scan has another content."""
        for scan in session.scans:
            record = self.outputs(scan).read_record()
            if record is None or record["status"] != "done" or record.get("listed_in", "") in ("", self.listed_in):
                continue
            with suppress(OSError):
                if file_sha256(scan.path) not in record["key"]:
                    return record
        return None

    def outputs(self, scan: SourceScan) -> Outputs:
        """The files written for `scan`."""
        problem_of = self.relative_source(scan) if scan.problem else ""  # another scan may have the same names
        names = BidsNames(scan.subject, scan.session, self.steps.space, self.steps.spacing, problem_of)
        return Outputs(self.out, names)

    def relative_source(self, scan: SourceScan) -> str:
        """Path of the raw scan relative to `out`: outputs contain no absolute path, so that they can be shared."""
        return os.path.relpath(scan.printable_path, self.out)

    def key(self, scan: SourceScan, labels: Path | None) -> str:
        """Key of content and parameters.

        Raises:
            BadScan: the file cannot be read.
        """
        try:
            parts = [self.steps.key(), file_sha256(scan.path), scan.problem]
            if partner := find_partner(scan.path):
                parts.append(file_sha256(partner))
            if self.steps.assume_orientation and not states_orientation(scan.path):
                parts.append(self.steps.assume_orientation)
        except FileNotFoundError as error:
            raise BadScan(reason_missing(scan.path), scan.path) from error
        except OSError as error:
            raise BadScan(f"unreadable ({error.strerror})", scan.path) from error
        if labels is not None:
            parts[3:3] = [_label_map_key(labels), repr(self.regions)]
        return ":".join(parts)

    def reject(
        self, session: SessionScans, reason: str, key: str = "", reasons: Mapping[int, str] | None = None
    ) -> Record:
        """Remove the outputs of an earlier run and record the reason; without a key, the next run tries again.

        Args:
            reasons: of the scans of the session, by their index.
        """
        others = [(session.scans[index], text) for index, text in (reasons or {}).items() if index]
        record = {"status": "rejected", "reason": reason, "key": key, "files": {}} | self._describe(session, 0, others)
        outputs = self.outputs(session.first)
        # A record that is the same stays where it is: another job may read it at this moment.
        if len(session.scans) > 1 or outputs.read_record() != record:
            self._remove_outputs(session)
            outputs.write_record(record)
        return record

    def _read_keys(self, session: SessionScans) -> tuple[list[str], dict[int, str]]:
        """The key of every scan, "" if it cannot be read, and the reasons why scans cannot be read, by index."""
        keys, reasons = [], {}
        for index, scan in enumerate(session.scans):
            try:
                keys.append(self.key(scan, session.labels))
            except BadScan as error:
                keys.append("")
                reasons[index] = error.reason
        if len(keys) > 1 and self.choice.compares:
            keys[0] += ":" + self.choice.name
        return keys, reasons

    def _read_finished(self, session: SessionScans, key: str) -> Record | None:
        for outputs in {self.outputs(scan) for scan in session.scans} if key else ():
            record = outputs.read_record()
            if record and record.get("key") == key and outputs.are_complete(record):
                return self._check_reading(record, outputs)
        return None

    def _check_reading(self, record: Record, outputs: Outputs) -> Record | None:
        """A record of an earlier version if its scan is still read as it was then, which is noted; otherwise None."""
        if record.get("reading") == READING:
            return record
        if record["status"] != "done" or not is_read_as_before(self.out / record["source"]):
            return None
        record["reading"] = READING
        outputs.write_record(record)
        return record

    def _preprocess(self, session: SessionScans, keys: list[str], reasons: dict[int, str]) -> Record:
        stopwatch = _Stopwatch()
        with tempfile.TemporaryDirectory(prefix="ldae-") as folder:
            chosen = self._choose(session, Path(folder), reasons)
            with wait_for_lock(self._lock(session)):
                # Another job may have finished the same scan meanwhile: its files stay.
                finished = self._read_finished(session, _join_keys(keys))
                if finished is not None:
                    return finished
                if chosen is None:
                    return self.reject(session, reasons[0], _join_keys(keys) if any(keys) else "", reasons)
                self._remove_outputs(session)
                return self._write(session, chosen, keys, reasons, stopwatch)

    def _write(
        self,
        session: SessionScans,
        chosen: tuple[int, PreprocessedScan],
        keys: list[str],
        reasons: Mapping[int, str],
        stopwatch: "_Stopwatch",
    ) -> Record:
        """Write the files of the scan that was chosen, and its record last."""
        index, result = chosen
        scan = session.scans[index]
        remove_temporaries(self.out / self.outputs(scan).names.folder)  # of a process that was killed
        record = self._write_outputs(session, index, result)
        others = [(other, reasons.get(number)) for number, other in enumerate(session.scans) if number != index]
        left_out = [(other, text or describe_choice(scan, other, self.choice)) for other, text in others]
        record |= {"key": _join_keys(keys), "measures": record["measures"] | stopwatch.read()}
        record |= self._describe(session, index, left_out)
        self.outputs(scan).write_record(record)
        return record

    def _lock(self, session: SessionScans) -> Path:
        """A lock for writing the files of a session; a few sessions share one."""
        return self.out / LOCKS / f"{crc32(self.outputs(session.first).names.stem.encode()) % 256:02x}"

    def _choose(
        self, session: SessionScans, folder: Path, reasons: dict[int, str]
    ) -> tuple[int, PreprocessedScan] | None:
        """Preprocess scans until one is usable, or all of them to compare; add the reasons of rejected ones."""
        chosen: tuple[int, PreprocessedScan] | None = None
        for index, scan in enumerate(session.scans):
            if index in reasons or (chosen and not self.choice.compares):
                continue
            scratch = folder / str(index)
            scratch.mkdir()
            try:
                result = self.steps(scan.path, scratch)
            except BadScan as error:
                reasons[index] = error.reason
                continue
            if chosen is None or quality(result.measures) > quality(chosen[1].measures):
                chosen = index, result
        return chosen

    def _remove_outputs(self, session: SessionScans) -> None:
        for outputs in {self.outputs(scan) for scan in session.scans}:
            outputs.remove()

    def _describe(self, session: SessionScans, index: int, others: Sequence[tuple[SourceScan, str]]) -> Record:
        """What a record says of the scan `index`, whether it is used or not."""
        scan = session.scans[index]
        return {
            "source": self.relative_source(scan),
            "reading": READING,
            "subject": scan.subject,
            "session": scan.session,
            "row": session.rows[index],
            "listed_in": self.listed_in,
            "left_out": [[self.relative_source(other), text] for other, text in (*others, *session.left_out)],
        }

    def _write_outputs(self, session: SessionScans, index: int, result: PreprocessedScan) -> Record:
        scan = session.scans[index]
        outputs = self.outputs(scan)
        template = template_brain(self.steps.grid(result.native)) if self.steps.registration else None
        files = outputs.write_images(result, template) | outputs.write_transforms(result)
        notes, regions = list(result.notes), {}
        if session.labels is not None:
            try:
                regions = outputs.write_labels(session.labels, self.regions, result, self.steps.assume_orientation)
                files["labels"] = outputs.names.labels
            except BadScan as error:
                notes.append(f"label map left out: {error}")
            if len(session.scans) > 1:
                notes.append(f"{session.labels.name} is taken for the label map of {scan.path.name}")
        record = {
            "status": "done",
            "reason": "",
            "source": self.relative_source(scan),
            "files": {name: str(path) for name, path in files.items()},
            "measures": result.measures,
            "regions": regions,
            "notes": notes,
        }
        outputs.write_sidecars(self.steps, result, record)
        return record


class _Stopwatch:
    """Time since it was made, on the wall and of this process."""

    def __init__(self) -> None:
        self._start, self._processor_start = time.monotonic(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            "seconds": time.monotonic() - self._start,
            "processor_seconds": time.process_time() - self._processor_start,
        }


def _join_keys(keys: Sequence[str]) -> str:
    """The key of a session; "" if none of its scans can be read."""
    return "+".join(keys) if any(keys) else ""


def _label_map_key(labels: Path) -> str:
    try:
        return file_sha256(labels)
    except OSError:  # it is named in the notes of the record
        return "unreadable"


@contextmanager
def _stop_on_disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise UserError(
                f"cannot write to {out} ({error.strerror}): what is done stays; make room and run again"
            ) from error
        raise
