"""A lock on a folder, so that only one process at a time writes to it.

The operating system releases the lock when its process ends, in whatever way it ends. On a network file system the lock
is valid across machines if that file system supports flock, as NFS under Linux does.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ldae.utils.errors import UserError
from ldae.utils.files import write_text

LOCK, HOLDER = ".lock", ".lock-holder"
MODE = 0o664  # of the files of locks: in a folder that a group shares, each of its members can open them
PATIENCE = 600.0  # seconds that a short lock is waited for


@contextmanager
def lock_folder(folder: Path, active: bool = True) -> Iterator[None]:
    """Hold the lock of `folder`, which is made if it does not exist, and removed again if nothing was written to it.

    Args:
        active: False does nothing, as on all processes of a run but the main one.

    Raises:
        UserError: another process holds the lock. It is not waited for.
    """
    if not active:
        yield
        return
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    holder = folder / HOLDER
    lock = FileLock(folder / LOCK, timeout=0, mode=MODE)
    try:
        lock.acquire()
    except Timeout as error:
        named = f" ({holder.read_text(encoding='utf-8')})" if holder.exists() else ""
        raise UserError(f"another process writes to {folder}{named}: wait for it, or stop it") from error
    try:
        write_text(holder, f"process {os.getpid()} on {socket.gethostname()}")  # it may be another user's
        yield
    finally:
        holder.unlink(missing_ok=True)
        if made and {path.name for path in folder.iterdir()} <= {LOCK}:  # refused: as if the command had not been typed
            (folder / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # another process has written to one of them
                for place in made:
                    place.rmdir()
        lock.release()


@contextmanager
def lock_file(path: Path, remedy: str) -> Iterator[None]:
    """Hold the lock of a file that only one process may write; the lock is a hidden file beside it.

    Args:
        remedy: what to do if another process holds it.

    Raises:
        UserError: another process holds the lock. It is not waited for.
    """
    lock = FileLock(lock_of(path), timeout=0, mode=MODE)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"another process writes to {path}: {remedy}") from error
    try:
        yield
    finally:
        lock.release()


def lock_of(path: Path) -> Path:
    """The lock of a file."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def wait_for_lock(path: Path) -> Iterator[None]:
    """Hold a lock that other processes hold for seconds only, as while they write a table; wait until it is free.

    Raises:
        UserError: it was not free within PATIENCE.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=PATIENCE, mode=MODE)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"another process has held {path} for {PATIENCE / 60:.0f} minutes: stop it") from error
    try:
        yield
    finally:
        lock.release()
