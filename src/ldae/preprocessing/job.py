"""One scan from disk to disk: outputs under BIDS-derivatives names, sidecars, mosaic, and last its record.

The record makes a scan count as done. It holds a key of the scan's content and of all parameters: with the same key
nothing is done again, with another everything is.
"""

import errno
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ldae.data.nifti import BadScan
from ldae.preprocessing.bids_names import NATIVE, BidsNames
from ldae.preprocessing.mosaic import write_mosaic
from ldae.preprocessing.regions import Regions
from ldae.preprocessing.registration import read_affine
from ldae.preprocessing.sources import SourceScan
from ldae.preprocessing.steps import PreprocessedScan, PreprocessingSteps
from ldae.preprocessing.template import template_brain
from ldae.preprocessing.volume import Volume
from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256, read_json, replacing, write_json

log = logging.getLogger(__name__)

MODULES = {"antspyx": "ants"}  # packages whose module has another name
PACKAGES = ("ldae", "antspyx", "deepbet", "nilearn", "nibabel", "numpy", "scipy")
# The disk is at fault, not the scan.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EIO}
# What the steps' libraries raise on scans that they cannot digest.
FAILURES = (RuntimeError, ValueError, ArithmeticError, AssertionError, LookupError, TypeError, MemoryError)

Record = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What every scan of a cohort has in common. Goes to worker processes."""

    steps: PreprocessingSteps
    out: Path
    regions: Regions | None = None

    def __call__(self, scan: SourceScan, labels: Path | None = None) -> Record:
        """Prepare `scan`, or say why not: {"status": "done" or "rejected", "reason", "files", "measures", ...}.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        names = self.names(scan)
        with _writable(self.out):
            try:
                key = self.key(scan, labels)
            except BadScan as error:
                return self._reject(scan, names, key="", reason=error.reason)
            return self._known(names, key) or self._make(scan, labels, names, key)

    def find_finished(self, scan: SourceScan, labels: Path | None = None) -> Record | None:
        """The record of an earlier run under the same content and parameters, or None."""
        try:
            return self._known(self.names(scan), self.key(scan, labels))
        except BadScan:
            return None

    def names(self, scan: SourceScan) -> BidsNames:
        """Where what becomes of `scan` lies."""
        return BidsNames(scan.subject, scan.session, self.steps.space, self.steps.spacing)

    def relative_source(self, scan: SourceScan) -> str:
        """Where the raw scan lies, from `out`: no absolute path goes into what may be passed on."""
        return os.path.relpath(scan.path, self.out)

    def key(self, scan: SourceScan, labels: Path | None) -> str:
        """Of content and parameters. Raises BadScan where there is no such file."""
        try:
            parts = [self.steps.key(), file_sha256(scan.path), scan.problem]
            if labels is not None:
                parts += [file_sha256(labels), repr(self.regions)]
        except OSError as error:
            raise BadScan(f"unreadable ({error.strerror})", scan.path) from error
        return ":".join(parts)

    def _known(self, names: BidsNames, key: str) -> Record | None:
        """The record under the same key, if all that it names is there."""
        path = self.out / names.record
        try:
            record = read_json(path)
        except (OSError, ValueError):
            return None
        complete = all((self.out / file).is_file() for file in record.get("files", {}).values())
        return record if record.get("key") == key and complete else None

    def _make(self, scan: SourceScan, labels: Path | None, names: BidsNames, key: str) -> Record:
        start, processor = time.monotonic(), time.process_time()
        with tempfile.TemporaryDirectory(prefix="ldae-") as folder:
            try:
                if scan.problem:
                    raise BadScan(scan.problem)
                prepared = self.steps(scan.path, Path(folder))
            except BadScan as error:
                return self._reject(scan, names, key, error.reason)
            except FAILURES as error:
                log.debug("%s failed", scan.path, exc_info=True)
                return self._reject(scan, names, key, f"{type(error).__name__}: {last_line(error)}")
            record = self._write(scan, labels, names, prepared)
        seconds = {"seconds": time.monotonic() - start, "processor_seconds": time.process_time() - processor}
        record |= {"key": key, "measures": record["measures"] | seconds}
        write_json(self.out / names.record, record)
        return record

    def _reject(self, scan: SourceScan, names: BidsNames, key: str, reason: str) -> Record:
        """Without a key, the scan is tried again next time. Outputs of an earlier run go."""
        record = {"status": "rejected", "reason": reason, "source": self.relative_source(scan), "key": key, "files": {}}
        if scan.problem:
            return record  # its name is another's too
        self._clear(names)
        write_json(self.out / names.record, record)
        return record

    def _clear(self, names: BidsNames) -> None:
        try:
            old = read_json(self.out / names.record).get("files", {})
        except (OSError, ValueError):
            return
        (self.out / names.record).unlink()
        for file in old.values():
            (self.out / file).unlink(missing_ok=True)
            (self.out / file.replace(".nii.gz", ".json")).unlink(missing_ok=True)

    def _write(self, scan: SourceScan, labels: Path | None, names: BidsNames, prepared: PreprocessedScan) -> Record:
        self._clear(names)
        files, notes, regions = {"scan": names.scan, "figure": names.figure}, list(prepared.notes), {}
        prepared.scan.write(self.out / names.scan)
        if prepared.mask is not None:
            prepared.scan.with_data(prepared.mask).write(self.out / names.mask, "uint8")
            prepared.native.with_data(prepared.native_mask).write(self.out / names.native_mask, "uint8")
            files |= {"mask": names.mask, "native_mask": names.native_mask}
        transforms = self._save_transforms(names, prepared)
        files |= transforms
        if labels is not None:
            try:
                regions = self._save_labels(labels, names, prepared)
                files["labels"] = names.labels
            except BadScan as error:
                notes.append(f"label map left out: {error}")
        template = template_brain(self.steps.grid(prepared.native)) if self.steps.registration else None
        write_mosaic(self.out / names.figure, prepared.unmasked.data, prepared.unmasked.affine, prepared.mask, template)
        record = {
            "status": "done",
            "reason": "",
            "source": self.relative_source(scan),
            "files": {name: str(path) for name, path in files.items()},
            "measures": prepared.measures,
            "regions": regions,
            "notes": notes,
        }
        self._sidecars(scan, names, prepared, record)
        return record

    def _save_transforms(self, names: BidsNames, prepared: PreprocessedScan) -> dict[str, Path]:
        """Under BIDS names: `forward_0` ... in ANTs' order, and `inverse_0` ... where they are other files."""
        found: dict[str, Path] = {}
        if prepared.transforms is None:
            return found
        for way, files in (("forward", prepared.transforms.forward), ("inverse", prepared.transforms.inverse)):
            for index, file in enumerate(files):
                affine = file.suffix == ".mat"  # one file serves both ways
                target = names.transform(affine or way == "forward", "".join(file.suffixes))
                if target not in found.values():
                    with replacing(self.out / target) as temporary:
                        shutil.copyfile(file, temporary)
                found[f"{way}_{index}"] = target
        return found

    def _save_labels(self, labels: Path, names: BidsNames, prepared: PreprocessedScan) -> dict[str, float]:
        native = Volume.read(labels, constant=True)
        if prepared.transforms is None:
            raise BadScan("a label map is carried by registration alone", labels)
        moved = prepared.transforms.labels_to_template(native, prepared.scan)
        moved.write(self.out / names.labels, "uint16")
        return self.regions.volumes(native) if self.regions else {}

    def _sidecars(self, scan: SourceScan, names: BidsNames, prepared: PreprocessedScan, record: Record) -> None:
        files = record["files"]
        about = {
            "Sources": [self.relative_source(scan)],
            "SkullStripped": prepared.mask is not None,
            "SpatialReference": self.steps.space or NATIVE,
            "Resolution": " x ".join(f"{size:.4g}" for size in prepared.scan.spacing) + " mm",
            "Software": {name: version(name) for name in PACKAGES if find_spec(MODULES.get(name, name))},
            "Parameters": self.steps.parameters(),
            "Measures": prepared.measures,
            "Notes": record["notes"],
            "Transforms": {name: path for name, path in files.items() if name.startswith(("forward", "inverse"))},
        }
        forward = prepared.transforms.forward if prepared.transforms else ()
        affines = [path for path in forward if path.suffix == ".mat"]
        if affines:
            about["TemplateToNative"] = read_affine(affines[0]).tolist()  # mm to mm, RAS; a warp comes on top of it
        write_json(self.out / str(names.scan).replace(".nii.gz", ".json"), about)
        for name in ("mask", "native_mask"):
            if name in files:
                mask = {
                    "Type": "Brain",
                    "Sources": [self.relative_source(scan)],
                    "Parameters": about["Parameters"]["brain"],
                }
                write_json(self.out / files[name].replace(".nii.gz", ".json"), mask)


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    """A disk's fault stops the run, in one line."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK:
            raise UserError(
                f"cannot write to {out} ({error.strerror}): what is done stays; make room and run again"
            ) from error
        raise


def last_line(error: BaseException) -> str:
    """The last line of what `error` says, "" if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[-1][:200] if lines else ""
