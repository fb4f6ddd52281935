"""One writer a folder: a second process that would write to the same run is refused.

The kernel drops the lock with its process, however that ends. Where a network disk keeps locks to one host, the file
itself tells: its holder touches it all the time, and one that is not touched any more belongs to a dead process.
"""

import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

BEAT = 15.0  # seconds between two touches
DEAD = 6 * BEAT  # without a touch


@contextmanager
def lock_folder(folder: Path, active: bool = True) -> Iterator[None]:
    """Inside, nobody else writes to `folder`; only if `active`, as on the main process of several.

    Raises:
        UserError: somebody does.
    """
    if not active:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+", encoding="utf-8") as handle:
        _acquire(handle, folder)
        handle.truncate(0)
        handle.write(f"{socket.gethostname()} {os.getpid()}")
        handle.flush()
        done = threading.Event()
        beat = threading.Thread(target=_beat, args=(handle.fileno(), done), daemon=True)
        beat.start()
        try:
            yield
        finally:
            done.set()
            beat.join()
            handle.truncate(0)


def _acquire(handle: TextIO, folder: Path) -> None:
    handle.seek(0)
    host, _, process = handle.read(200).partition(" ")
    refusal = f"another process writes to {folder} (process {process or '?'} on {host or '?'}): wait for it, or stop it"
    here = host in ("", socket.gethostname())
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(refusal) from error
    except OSError as error:
        log.warning("%s is on a disk without locks (%s)", folder, error)
        if here and process != str(os.getpid()) and _runs(process):
            raise UserError(refusal) from error
    if not here:
        _wait_for_death(handle.fileno(), refusal)


def _runs(process: str) -> bool:
    return process.isdigit() and Path(f"/proc/{process}").exists()


def _wait_for_death(handle: int, refusal: str) -> None:
    """Return once the file has not been touched for DEAD seconds; refuse if it is touched."""
    first = os.fstat(handle).st_mtime_ns
    left = DEAD - (time.time() - first / 1e9)
    if left <= 0:
        return
    log.info("a process on another host held this run %.0f s ago; waiting whether it still does", DEAD - left)
    end = time.monotonic() + min(left, DEAD)
    while time.monotonic() < end:
        time.sleep(min(1.0, BEAT))
        if os.fstat(handle).st_mtime_ns != first:
            raise UserError(refusal)


def _beat(handle: int, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with suppress(OSError):  # a network disk that is away for a moment
            os.utime(handle)
