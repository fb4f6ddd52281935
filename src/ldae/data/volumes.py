"""Preprocessed scans on disk: each is brought to model space once, and read memory-mapped from then on."""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ldae.data.file_version import FileVersion
from ldae.data.nifti import READING, BadScan, Source, is_read_as_before, states_orientation
from ldae.data.sharing import work_order
from ldae.utils.errors import UserError
from ldae.utils.files import replacing, write_text
from ldae.utils.process_pool import DIED, DIED_REASON, available_cores, run_in_processes

log = logging.getLogger(__name__)

STORED_MAXIMUM = {"float16": 1.0, "uint8": 255.0}  # by dtype of the files: the value that stands for an intensity of 1
CHANGED = ".changed"  # suffix of a note with the digest of the volume of a scan that has changed unnoticed
MIN_SCANS_PER_PROCESS = 64  # with fewer, a process takes longer to import MONAI than to transform them


class VolumeMaker(Protocol):
    """Makes the volume of a scan: a Transform, or a View (ldae.data.view).

    Attributes:
        channels: number of maps of a volume.
        shape: voxels (X, Y, Z).
        assume_orientation: see Transform.
    """

    channels: int
    shape: tuple[int, int, int]
    assume_orientation: str | None

    def key(self) -> str:
        """Identity: a maker with the same key makes the same volumes."""
        ...

    def __call__(self, source: Source) -> np.ndarray:
        """The volume of a scan, (channels, X, Y, Z) float32 in [0, 1].

        Raises:
            BadScan: the scan cannot be used.
        """
        ...


@dataclass(frozen=True)
class Volumes:
    """Cached volumes in the order in which they were asked for. Every read maps one small file.

    Attributes:
        scans: path of each scan.
        files: the cache file of each scan.
        shape: voxels (X, Y, Z).
        stored_maximum: the stored value that stands for 1.
        versions: the version of each scan that its volume was made from.
        channels: number of maps of a volume, C.
    """

    scans: Sequence[str]
    files: Sequence[Path]
    shape: tuple[int, int, int]
    stored_maximum: float
    versions: Sequence[FileVersion] = ()
    channels: int = 1

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        """Volume `index`, (C, X, Y, Z) float32 in [0, 1]."""
        return self.batch([index])[0]

    @property
    def dtype(self) -> str:
        """Data type of the files, one of STORED_MAXIMUM."""
        return next(name for name, maximum in STORED_MAXIMUM.items() if maximum == self.stored_maximum)

    def batch(self, indices: Iterable[int]) -> Tensor:
        """Volumes `indices`, (B, C, X, Y, Z) float32 in [0, 1].

        Raises:
            UserError: a cache file is missing or damaged.
        """
        return self.decode(self.read_stored(indices))

    def decode(self, stored: Tensor) -> Tensor:
        """Convert what `read_stored` gave, (B, C, X, Y, Z), to float32 in [0, 1] on the device that it is on."""
        if self.stored_maximum == 1:
            return stored.float()
        # The divisor is a tensor on the device: instead of by a number, CUDA multiplies by its reciprocal, which rounds
        # differently.
        return stored.float().div_(torch.full((), self.stored_maximum, device=stored.device))

    def of_scans(self, scans: Sequence[str]) -> "Volumes":
        """The volumes of some of the scans, in the order of `scans`."""
        places = {scan: place for place, scan in enumerate(self.scans)}
        chosen = [places[scan] for scan in scans]
        versions = [self.versions[place] for place in chosen] if self.versions else ()
        return replace(self, scans=list(scans), files=[self.files[place] for place in chosen], versions=versions)

    def read_stored(self, indices: Iterable[int]) -> Tensor:
        """Volumes `indices` in the data type of the files, (B, C, X, Y, Z): half or a quarter of float32 to transfer.

        Raises:
            UserError: a cache file is missing or damaged.
        """
        indices = [int(index) for index in indices]
        result = np.empty((len(indices), self.channels, *self.shape), dtype=self.dtype)
        shape = self.shape if self.channels == 1 else (self.channels, *self.shape)
        for volume, index in zip(result, indices, strict=True):
            try:
                stored = np.load(self.files[index], mmap_mode="r", allow_pickle=False)
                if stored.shape != shape:
                    raise ValueError(f"its shape is {stored.shape}, not {shape}")
                if stored.dtype != self.dtype:
                    raise ValueError(f"its data type is {stored.dtype}, not {self.dtype}")
            except (OSError, ValueError, EOFError) as error:
                raise UserError(
                    f"cached volume {self.files[index]} of {self.scans[index]} is gone or damaged ({error}): "
                    "delete it and run again"
                ) from error
            volume[:] = stored
        return torch.from_numpy(result)


class VolumeCache:
    """A folder of volumes: <root>/<transform key>-<dtype>/<2 hex>/<file key>.npy.

    The key of a file is made of the scan's path, size and time of change: a scan that is replaced is transformed again.
    If the file system has noted any change of a scan since its volume was written, it is also transformed again and
    compared with that volume: this finds scans whose content has changed while size and time of change are the same.
    Volumes of an earlier version of ldae are checked once: they are kept if the voxels of the scan are still read as
    before (see `nifti.READING`). A file in the folder marks the time from which this is not needed.
    Several processes may fill the cache at the same time: each file appears complete or not at all.

    Args:
        root: folder of all caches.
        transform: brings a scan to model space, or makes another volume of it.
        dtype: "float16", or "uint8" for half the disk space at a resolution of 1/255.

    Raises:
        UserError: another dtype.
    """

    def __init__(self, root: Path | str, transform: VolumeMaker, dtype: str = "float16") -> None:
        if dtype not in STORED_MAXIMUM:
            raise UserError(f"data.cache_dtype={dtype}: one of {', '.join(STORED_MAXIMUM)} is needed")
        self.transform = transform
        self.dtype = dtype
        self.folder = Path(root).absolute() / f"{transform.key()}-{dtype}"

    def file(self, scan: str | Path) -> Path:
        """The cache file of `scan`, whether it exists or not.

        Raises:
            BadScan: there is no such scan.
        """
        return self._file(FileVersion.of(scan))

    def build(
        self, scans: Iterable[str], workers: int | None = None, progress: bool = True, share: tuple[int, int] = (0, 1)
    ) -> tuple[Volumes, dict[str, str]]:
        """Transform the scans that are not in the cache yet, and open the volumes of all.

        Several processes may build the same scans at the same time without communicating: each begins with its own
        share, continues with what the others have not made yet, and returns once all volumes exist.

        Args:
            workers: processes that this one starts; by default one per available CPU core.
            share: number of this process, from 0, and number of processes that build.

        Returns:
            The volumes of the usable scans, in the order of `scans`, and the reason why each other scan is rejected.
            Reasons are not stored: rejected scans are tried again by the next build and by every process.
        """
        scans = [str(scan) for scan in scans]
        versions: dict[str, FileVersion] = {}
        rejected: dict[str, str] = {}
        for scan in dict.fromkeys(scans):
            try:
                versions[scan] = FileVersion.of(scan)
            except BadScan as error:
                rejected[scan] = error.reason
        self._mark_reading()
        known = list(versions)
        contents = {scan: self._content(version) for scan, version in versions.items()}
        ordered = [known[number] for number in work_order(len(known), *share)]
        unknown = [scan for scan in ordered if contents[scan] is None]
        rejected |= self._transform([(scan, versions[scan]) for scan in unknown], workers, progress)
        contents |= {scan: self._content(versions[scan]) for scan in unknown if scan not in rejected}
        usable = [scan for scan in scans if scan not in rejected]
        present = [versions[scan]._replace(content=contents[scan] or "") for scan in usable]
        maximum = STORED_MAXIMUM[self.dtype]
        files, maker = list(map(self._file, present)), self.transform
        return Volumes(usable, files, maker.shape, maximum, present, maker.channels), rejected

    def _content(self, version: FileVersion) -> str | None:
        """FileVersion.content of a scan whose volume is stored; None if the scan must be transformed."""
        file = self._file(version)
        try:
            if self._is_checked(file, version):
                return ""
            note = file.with_suffix(CHANGED)
            return note.read_text(encoding="ascii") if self._is_checked(note, version) else None
        except FileNotFoundError:
            return None

    def _is_checked(self, file: Path, version: FileVersion) -> bool:
        """Whether `file` was made or compared after the last change of the scan, as scans are read at present."""
        return version.is_older_than(file) and self._marker.stat().st_mtime_ns <= file.stat().st_mtime_ns

    @property
    def _marker(self) -> Path:
        return self.folder / f"reading_{READING}"

    def _mark_reading(self) -> None:
        """Make the file whose time tells volumes of this version of ldae from older ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            open(self._marker, "x").close()

    def update(self, scan: str, version: FileVersion) -> None:
        """Store the volume of `scan`; if one of `version` is stored already, compare it with that.

        Raises:
            BadScan: the scan cannot be used.
        """
        if self._content(version) is not None:  # another process was faster
            return
        file = self._file(version)
        if not file.exists():
            _write_volume(file, self.make(scan))
        elif not (version.is_older_than(file) and is_read_as_before(scan)):
            file = self._compare(file, self.make(scan), version, scan)
        # The clock of a file server may be ahead of this machine's.
        now = max(time.time_ns(), version.touched + 1, self._marker.stat().st_mtime_ns)
        try:
            os.utime(file, ns=(now, now))
        except PermissionError:  # a file of another user, in a cache that several users share
            with replacing(file) as temporary:
                shutil.copyfile(file, temporary)
                os.utime(temporary, ns=(now, now))

    def _compare(self, file: Path, volume: np.ndarray, version: FileVersion, scan: str) -> Path:
        """Store a volume and a note if it is not that in `file`; returns what shows that the scan has been compared."""
        try:
            stored = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):  # damaged
            _write_volume(file, volume)
            return file
        if np.array_equal(volume, stored):
            return file
        if version.is_older_than(file):
            log.info("%s is read differently by this version of ldae", scan)
        else:
            log.info("%s has changed, although its size and its time of change are the same", scan)
        content = hashlib.sha256(volume.tobytes()).hexdigest()[:32]
        _write_volume(self._file(version._replace(content=content)), volume)
        note = file.with_suffix(CHANGED)
        write_text(note, content)
        return note

    def make(self, scan: str) -> np.ndarray:
        """The volume of a scan as it is stored, (X, Y, Z), or (C, X, Y, Z) with several channels.

        Raises:
            BadScan: the scan cannot be used.
        """
        volume = self.transform(scan)
        volume = volume[0] if self.transform.channels == 1 else volume
        if self.dtype == "uint8":
            volume = np.rint(volume * STORED_MAXIMUM["uint8"])
        return volume.astype(self.dtype)

    def _file(self, version: FileVersion) -> Path:
        assumed = self.transform.assume_orientation
        key = version.cache_key(assumed) if assumed and not states_orientation(version.path) else version.cache_key()
        return self.folder / key[:2] / f"{key[2:]}.npy"

    def _transform(
        self, scans: Sequence[tuple[str, FileVersion]], workers: int | None, progress: bool
    ) -> dict[str, str]:
        """Store the volumes of scans with their versions. Returns the reason of each failure."""
        if not scans:
            return {}
        log.info("transforming %d scans into %s", len(scans), self.folder)
        workers = workers or available_cores()
        workers = workers if min(workers, len(scans) // MIN_SCANS_PER_PROCESS) > 1 else 0
        items = [(self, *item) for item in scans]
        results = run_in_processes(_update, items, workers, label="volumes", progress=progress)
        reasons = {scans[index][0]: DIED_REASON if reason is DIED else reason for index, reason in results}
        return {scan: reason for scan, reason in reasons.items() if reason is not None}


def _update(cache: VolumeCache, scan: str, version: FileVersion) -> str | None:
    """Store the volume of one scan. Returns the reason if the scan cannot be used."""
    try:
        cache.update(scan, version)
    except BadScan as error:
        return error.reason
    return None


def _write_volume(target: Path, volume: np.ndarray) -> None:
    with replacing(target) as temporary:
        np.save(temporary, volume)
