"""Preprocessing of one scan, from its file to the files below the output folder.

The record of a scan is written last and marks it as finished. It contains a key computed from the scan's content and
all parameters: as long as the key is the same, the scan is not preprocessed again.
"""

import errno
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ldae.data.nifti import BadScan
from ldae.preprocessing.bids_names import BidsNames
from ldae.preprocessing.outputs import Outputs, Record
from ldae.preprocessing.regions import Regions
from ldae.preprocessing.sources import SourceScan
from ldae.preprocessing.steps import PreprocessedScan, PreprocessingSteps
from ldae.preprocessing.template import template_brain
from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256

# Errors of the disk, which stop the whole run; other errors concern one scan.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EIO}


@dataclass(frozen=True)
class Job:
    """Preprocesses single scans; it is sent to the worker processes.

    Attributes:
        steps: the steps and their parameters.
        out: output folder.
        regions: volumes to measure in label maps, or None.
    """

    steps: PreprocessingSteps
    out: Path
    regions: Regions | None = None

    def __call__(self, scan: SourceScan, labels: Path | None = None) -> Record:
        """Preprocess `scan`, with its label map if there is one, and return its record.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        with _stop_on_disk_errors(self.out):
            try:
                key = self.key(scan, labels)
            except BadScan as error:
                return self._reject(scan, key="", reason=error.reason)
            return self._read_finished(scan, key) or self._preprocess(scan, labels, key)

    def find_finished(self, scan: SourceScan, labels: Path | None = None) -> Record | None:
        """The record of an earlier run with the same content and parameters, or None."""
        try:
            return self._read_finished(scan, self.key(scan, labels))
        except BadScan:
            return None

    def outputs(self, scan: SourceScan) -> Outputs:
        """The files written for `scan`."""
        return Outputs(self.out, BidsNames(scan.subject, scan.session, self.steps.space, self.steps.spacing))

    def relative_source(self, scan: SourceScan) -> str:
        """Path of the raw scan relative to `out`: outputs contain no absolute path, so that they can be shared."""
        return os.path.relpath(scan.path, self.out)

    def key(self, scan: SourceScan, labels: Path | None) -> str:
        """Key of content and parameters.

        Raises:
            BadScan: the file cannot be read.
        """
        try:
            parts = [self.steps.key(), file_sha256(scan.path), scan.problem]
            if labels is not None:
                parts += [file_sha256(labels), repr(self.regions)]
        except OSError as error:
            raise BadScan(f"unreadable ({error.strerror})", scan.path) from error
        return ":".join(parts)

    def _read_finished(self, scan: SourceScan, key: str) -> Record | None:
        outputs = self.outputs(scan)
        record = outputs.read_record()
        return record if record and record.get("key") == key and outputs.are_complete(record) else None

    def _preprocess(self, scan: SourceScan, labels: Path | None, key: str) -> Record:
        start, processor_start = time.monotonic(), time.process_time()
        with tempfile.TemporaryDirectory(prefix="ldae-") as folder:
            try:
                if scan.problem:
                    raise BadScan(scan.problem)
                result = self.steps(scan.path, Path(folder))
            except BadScan as error:
                return self._reject(scan, key, error.reason)
            record = self._write_outputs(scan, labels, result)
        seconds = {
            "seconds": time.monotonic() - start,
            "processor_seconds": time.process_time() - processor_start,
        }
        record |= {"key": key, "measures": record["measures"] | seconds}
        self.outputs(scan).write_record(record)
        return record

    def _reject(self, scan: SourceScan, key: str, reason: str) -> Record:
        """Remove the outputs of an earlier run and record the reason; without a key, the next run tries again."""
        record = {"status": "rejected", "reason": reason, "source": self.relative_source(scan), "key": key, "files": {}}
        if not scan.problem:  # with a problem, another scan may have the same names
            outputs = self.outputs(scan)
            outputs.remove()
            outputs.write_record(record)
        return record

    def _write_outputs(self, scan: SourceScan, labels: Path | None, result: PreprocessedScan) -> Record:
        outputs = self.outputs(scan)
        outputs.remove()
        template = template_brain(self.steps.grid(result.native)) if self.steps.registration else None
        files = outputs.write_images(result, template) | outputs.write_transforms(result)
        notes, regions = list(result.notes), {}
        if labels is not None:
            try:
                regions = outputs.write_labels(labels, self.regions, result)
                files["labels"] = outputs.names.labels
            except BadScan as error:
                notes.append(f"label map left out: {error}")
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
