"""Stopping by a signal: the first one stops training after the current step, a second one ends the process at once."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

from ldae.utils.errors import EXIT_REQUEUE

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_SECONDS = 2.0  # within which torchrun repeats to its workers a signal that the terminal sent to all processes


class StopSignals:
    """Context in which a signal only sets `received`; `leave` then ends the process.

    SIGUSR2 is handled only if submitit, which uses it, has installed a handler.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._previous: dict[int, signal.Handlers | Callable[..., object] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        numbers = [*SIGNALS, *([signal.SIGUSR2] if callable(signal.getsignal(signal.SIGUSR2)) else [])]
        self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            log.warning("%s: stopping after this step; send it again to end at once", signal.Signals(number).name)
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._since > ECHO_SECONDS:
            os._exit(128 + number)  # without clean-up, which could block; the checkpoints on disk are complete

    def leave(self) -> None:
        """End the process with EXIT_REQUEUE, on which a scheduler starts the same command again.

        A handler that was installed before, such as submitit's, is called first: it requeues the job.
        """
        handler = self._previous.get(self.received)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self.received, None)
        sys.exit(EXIT_REQUEUE)
