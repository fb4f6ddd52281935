"""The state of a file that a cache was made from: a file that is replaced is another version."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from ldae.data.nifti import BadScan, find_partner, reason_missing


class FileVersion(NamedTuple):
    """A file's absolute path, its size in bytes and the time of its last change in nanoseconds.

    A header and its voxels in two files are one: their sizes together, and the later change.
    """

    path: str
    size: int
    changed: int

    @classmethod
    def of(cls, source: str | Path) -> "FileVersion":
        """The present version of a file.

        Raises:
            BadScan: there is no such file.
        """
        path = os.path.abspath(source)
        try:
            status = os.stat(path)
        except OSError as error:
            raise BadScan(reason_missing(path), path) from error
        partner = find_partner(path)
        if partner is None:
            return cls(path, status.st_size, status.st_mtime_ns)
        other = partner.stat()
        return cls(path, status.st_size + other.st_size, max(status.st_mtime_ns, other.st_mtime_ns))

    @property
    def identity(self) -> tuple[int | str, ...]:
        """What distinguishes this version from others of the same scan, wherever the file is."""
        return (self.size, self.changed)

    def cache_key(self, *further: object) -> str:
        """34 hexadecimal digits under which a cache stores what was made of this version.

        Args:
            further: values that distinguish several results made of the same file, by their `repr`.
        """
        return hashlib.sha256(repr((*self, *further)).encode()).hexdigest()[:34]
