"""What every entry point does around its work: one line for a user's mistake, a traceback for ours."""

import errno
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ldae.utils.errors import EXIT_REQUEUE, EXIT_USER_ERROR, UserError

log = logging.getLogger("ldae")

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what caused it: Hydra wraps what a constructor raises."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain(error: BaseException) -> str | None:
    """One line for what a user can mend; None for our own faults."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given, e.g. {error.full_key}=VALUE"
    for cause in _chain(error):
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, OmegaConfBaseException):
            return f"config: {str(cause).splitlines()[0]} ({cause.full_key})"
        if isinstance(cause, OSError) and cause.errno in STORAGE:
            return f"{cause.strerror}: {cause.filename or 'cannot write'}; what was saved before is whole"
        if _out_of_memory(cause):
            return (
                f"out of memory ({str(cause).splitlines()[0] if str(cause) else type(cause).__name__}): lower "
                "trainer.batch_size and raise trainer.accumulate by the same factor, or give "
                "trainer.checkpointing=true, accelerator=bf16 or a smaller model=..."
            )
    return None


def _out_of_memory(error: BaseException) -> bool:
    # By name: torch takes seconds to import, and a mistyped key is to be told at once.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def _leave(number: int, frame: FrameType | None) -> None:
    log.warning("%s: stopped; the same command goes on", signal.Signals(number).name)
    sys.exit(EXIT_REQUEUE)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line on stderr and exit code 2, and a signal into one to requeue on.

    The trainer puts its own handlers over these while there are steps to save.
    """
    previous = {number: signal.signal(number, _leave) for number in SIGNALS}
    try:
        yield
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        log.error("%s", line)
        sys.exit(EXIT_USER_ERROR)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
