"""The name under which a cache keeps what was made of a file."""

import hashlib
import os
from pathlib import Path

from ldae.data.nifti import BadScan


def cache_key(source: str | Path, *further: object) -> str:
    """34 hex digits for a file's path, size and time of change, and for `further` values that tell apart by `repr`.

    A file that is replaced gets another key, so that nothing old is ever read for it.

    Raises:
        BadScan: there is no such file.
    """
    path = os.path.abspath(source)
    try:
        status = os.stat(path)
    except OSError as error:
        raise BadScan("no such file", path) from error
    return hashlib.sha256(repr((path, status.st_size, status.st_mtime_ns, *further)).encode()).hexdigest()[:34]
