"""The state of a file that a cache was made from: a file that is replaced is another version."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from ldae.data.nifti import BadScan, find_partner, reason_missing


class FileVersion(NamedTuple):
    """A file's absolute path, its size in bytes and the time of its last change in nanoseconds.

    A header and its voxels in two files are one: their sizes together, and the later change.

    Attributes:
        touched: when the file system last noted any change of the file, in nanoseconds. Unlike the time of change, it
            cannot be moved back.
        content: digest of the content, if the file was found to have changed under the same size and time of change;
            otherwise empty.
    """

    path: str
    size: int
    changed: int
    touched: int = 0
    content: str = ""

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
        files = [status] if partner is None else [status, partner.stat()]
        return cls(
            path,
            sum(file.st_size for file in files),
            max(file.st_mtime_ns for file in files),
            max(file.st_ctime_ns for file in files),
        )

    def is_older_than(self, file: Path) -> bool:
        """Whether `file`, which was made of this one, was written after the last change of this one."""
        return self.touched < file.stat().st_mtime_ns

    @property
    def identity(self) -> tuple[int | str, ...]:
        """What distinguishes this version from others of the same scan, wherever the file is."""
        return (self.size, self.changed, self.content) if self.content else (self.size, self.changed)

    def cache_key(self, *further: object) -> str:
        """34 hexadecimal digits under which a cache stores what was made of this version.

        Args:
            further: values that distinguish several results made of the same file, by their `repr`.
        """
        return hashlib.sha256(repr((self.path, *self.identity, *further)).encode()).hexdigest()[:34]
