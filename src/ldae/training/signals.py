"""Stopping between two steps: the first signal asks, the second one ends the process at once."""

import logging
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

from ldae.utils.errors import EXIT_REQUEUE

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO = 2.0  # seconds in which torchrun repeats to its workers what the terminal has sent to all


class StopSignals:
    """While open, signals only set `received`; `leave` then ends the process, or hands over to who was there before.

    SIGUSR2 belongs to submitit, and is taken only where its handler is in place.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

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
            log.warning("%s: ending after this step; once more to end now", signal.Signals(number).name)
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - self._since > ECHO:
            os._exit(128 + number)  # no clean-up that might wait: what is saved is whole

    def leave(self) -> None:
        """End the process so that a scheduler starts the same command again."""
        handler = self._previous.get(self.received)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self.received, None)  # submitit's puts the job back into the queue
        sys.exit(EXIT_REQUEUE)
