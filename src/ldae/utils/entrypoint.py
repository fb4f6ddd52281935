"""What every script does with errors and signals: one line for what a user can correct, otherwise a traceback."""

import errno
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from hydra.errors import HydraException
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ldae.utils.errors import EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from ldae.utils.overrides import quote_overrides
from ldae.utils.shards import shard_override

log = logging.getLogger("ldae")

SCRIPTS, CONSOLE = ("train.py", "encode_latents.py", "evaluate.py"), "ldae"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and its causes, because Hydra wraps what a constructor raises."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def explain(error: BaseException) -> str | None:
    """One line for an error that a user can correct; None for a defect of this project."""
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given, e.g. {error.full_key}=VALUE"
    for cause in _chain(error):
        if isinstance(cause, UserError):
            return str(cause)
        if isinstance(cause, HydraException):
            return _explain_composing(cause)
        if isinstance(cause, OmegaConfBaseException):
            return f"config: {str(cause).splitlines()[0]} ({cause.full_key})"
        if isinstance(cause, OSError) and cause.errno in STORAGE:
            return f"{cause.strerror}: {cause.filename or 'cannot write'}; what was saved before is intact"
        if _out_of_memory(cause):
            return (
                f"out of memory ({str(cause).splitlines()[0] if str(cause) else type(cause).__name__}): lower "
                "trainer.batch_size and raise trainer.accumulate by the same factor, or give "
                "trainer.checkpointing=true, accelerator=bf16 or a smaller model=..."
            )
    return None


def _explain_composing(error: HydraException) -> str:
    """One line for a command line of which no config can be composed."""
    text = str(error)
    if unknown := re.search(r"Could not override '([^']+)'", text):
        return f"there is no setting '{unknown[1]}' to change: --cfg job prints all settings"
    if wrong := re.search(r"Error merging override (.+)", text):
        reason = str(list(_chain(error))[-1]).splitlines() or [text]
        return f"{wrong[1]}: {reason[0]}"
    return f"the command line gives no config: {' '.join(text.split('Config search path')[0].split())[:400]}"


def _out_of_memory(error: BaseException) -> bool:
    # Compared by name: torch takes seconds to import, and a mistyped key should be reported at once.
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    log.warning("%s: stopped; the same command continues", signal.Signals(number).name)
    sys.exit(EXIT_REQUEUE)


def run_script(main: Callable[[], None]) -> None:
    """Call the `hydra.main` function of a script: arguments are taken as people type them, and errors are one line."""
    with one_line_errors():
        sys.argv[1:] = quote_overrides(shard_override(sys.argv[1:]))
        # Otherwise Hydra prints errors of composing itself, in several lines with links.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        main()


def describe_command() -> str:
    """The command line of this process, to be run again; "" if neither a script nor the console tool was started."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    words = ["python", program] if program in SCRIPTS else [program] if program == CONSOLE else []
    return shlex.join([*words, *sys.argv[1:]]) if words else ""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Report an error that a user can correct in one line, with EXIT_USER_ERROR, and end on a signal with EXIT_REQUEUE.

    The trainer replaces the handlers of signals by its own while it trains.
    """
    previous = {number: signal.signal(number, _exit_on_signal) for number in SIGNALS}
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
