"""Scans in model space on disk: made once, in parallel, under a key of file and transform; read memory-mapped."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldae.data.cache_key import cache_key
from ldae.data.nifti import BadScan
from ldae.data.sharing import work_order
from ldae.data.transforms import Transform
from ldae.utils.errors import UserError
from ldae.utils.files import replacing
from ldae.utils.process_pool import DIED, DIED_REASON, available_cores, run_in_processes

log = logging.getLogger(__name__)

STORED_MAXIMUM = {"float16": 1.0, "uint8": 255.0}  # and what 1 is stored as
MIN_SCANS_PER_PROCESS = 64  # scans a process: below that, it is slower to import MONAI there than to do the work here


@dataclass(frozen=True)
class Volumes:
    """Cached volumes in the order they were asked for. Holds names only: every read maps one small file."""

    scans: Sequence[str]
    files: Sequence[Path]
    shape: tuple[int, int, int]
    stored_maximum: float  # the stored value of 1

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        """Volume `index`, (1, X, Y, Z) float32 in [0, 1]."""
        return self.batch([index])[0]

    @property
    def dtype(self) -> str:
        """What the files hold, one of DTYPES."""
        return next(name for name, top in STORED_MAXIMUM.items() if top == self.stored_maximum)

    def batch(self, indices: Iterable[int]) -> Tensor:
        """Volumes `indices`, (B, 1, X, Y, Z) float32 in [0, 1].

        Raises:
            UserError: a cached file is gone or damaged.
        """
        return self.decode(self.read_stored(indices))

    def decode(self, stored: Tensor) -> Tensor:
        """What `stored` gave, (B, 1, X, Y, Z), on any device, as float32 in [0, 1] there."""
        if self.stored_maximum == 1:
            return stored.float()
        # By a tensor of the device: by a number, CUDA multiplies with its reciprocal, which rounds otherwise.
        return stored.float().div_(torch.full((), self.stored_maximum, device=stored.device))

    def read_stored(self, indices: Iterable[int]) -> Tensor:
        """Volumes `indices` as they lie in the cache, (B, 1, X, Y, Z) float16 or uint8: half or a quarter to move.

        Raises:
            UserError: a cached file is gone or damaged.
        """
        indices = [int(index) for index in indices]
        result = np.empty((len(indices), 1, *self.shape), dtype=self.dtype)
        for volume, index in zip(result, indices, strict=True):
            try:
                stored = np.load(self.files[index], mmap_mode="r", allow_pickle=False)
                if stored.shape != self.shape:
                    raise ValueError(f"its shape is {stored.shape}, not {self.shape}")
                if stored.dtype != self.dtype:
                    raise ValueError(f"it holds {stored.dtype}, not {self.dtype}")
            except (OSError, ValueError, EOFError) as error:
                raise UserError(
                    f"cached volume {self.files[index]} of {self.scans[index]} is gone or damaged ({error}): "
                    "delete it and run again"
                ) from error
            volume[0] = stored
        return torch.from_numpy(result)


class VolumeCache:
    """A folder of volumes: <root>/<transform key>-<dtype>/<2 hex>/<file key>.npy.

    A file's key is its path, size and time of change: a scan that is replaced is transformed again. Any number of
    processes may build at the same time; each file appears whole or not at all.

    Args:
        root: folder of all caches.
        transform: what makes a volume of a scan.
        dtype: "float16", or "uint8" for half the disk at 1/255 of the range.

    Raises:
        UserError: another dtype.
    """

    def __init__(self, root: Path | str, transform: Transform, dtype: str = "float16") -> None:
        if dtype not in STORED_MAXIMUM:
            raise UserError(f"data.cache_dtype={dtype}: one of {', '.join(STORED_MAXIMUM)} is needed")
        self.transform = transform
        self.dtype = dtype
        self.folder = Path(root).absolute() / f"{transform.key()}-{dtype}"

    def file(self, scan: str | Path) -> Path:
        """Where the volume of `scan` is or will be.

        Raises:
            BadScan: there is no such scan.
        """
        key = cache_key(scan)
        return self.folder / key[:2] / f"{key[2:]}.npy"

    def build(
        self, scans: Iterable[str], workers: int | None = None, progress: bool = True, share: tuple[int, int] = (0, 1)
    ) -> dict[str, str]:
        """Make what is not there yet.

        Several processes that build the same scans at the same time help each other without a word: each begins with
        its own share, goes on with what the others have not made yet, and returns once all is there.

        Args:
            workers: processes that this one starts; by default as many as there are CPUs for us.
            share: this process, counted from 0, and how many build.

        Returns:
            Bad scans and why they are bad. They are not remembered: the next build, and every process that takes part
            in this one, tries them again.
        """
        bad: dict[str, str] = {}
        todo = []
        scans = list(dict.fromkeys(str(scan) for scan in scans))
        for scan in (scans[number] for number in work_order(len(scans), *share)):
            try:
                if not self.file(scan).exists():
                    todo.append(scan)
            except BadScan as error:
                bad[scan] = error.reason
        if todo:
            log.info("transforming %d scans into %s", len(todo), self.folder)
            workers = workers or available_cores()
            workers = workers if min(workers, len(todo) // MIN_SCANS_PER_PROCESS) > 1 else 0
            items = [(self, scan) for scan in todo]
            for index, reason in run_in_processes(_store, items, workers, label="volumes", progress=progress):
                if reason is not None:
                    bad[todo[index]] = DIED_REASON if reason is DIED else reason
        return bad

    def open(self, scans: Sequence[str]) -> Volumes:
        """The volumes of `scans`, in that order.

        Raises:
            UserError: one has not been built.
        """
        files = [self.file(scan) for scan in scans]
        for scan, file in zip(scans, files, strict=True):
            if not file.exists():
                raise UserError(f"{scan} is not in the cache {self.folder}: build it first")
        return Volumes(tuple(scans), tuple(files), self.transform.shape, STORED_MAXIMUM[self.dtype])


def _store(cache: VolumeCache, scan: str) -> str | None:
    """Transform one scan and write it. Returns why it is bad, or None."""
    try:
        target = cache.file(scan)
        if target.exists():  # another process was faster
            return None
        volume = cache.transform(scan)[0]
    except BadScan as error:
        return error.reason
    if cache.dtype == "uint8":
        volume = np.rint(volume * STORED_MAXIMUM["uint8"])
    with replacing(target) as temporary:
        np.save(temporary, volume.astype(cache.dtype))
    return None
