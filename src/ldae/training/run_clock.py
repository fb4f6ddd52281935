"""The wall clock of a training over all its resumptions, `progress.json` in the folder of the run (ldae.runs)."""

import time

from ldae.runs import PROGRESS, Run
from ldae.utils.files import write_json


class RunClock:
    """Counts the seconds of a training, from the first step on, with its validations and checkpoints.

    Args:
        step: at which the training starts or resumes; what was done after the last checkpoint is not counted.
    """

    def __init__(self, run: Run, step: int) -> None:
        self._run = run
        self._before = run.progress.get("seconds", 0.0) if step > 0 else 0.0
        self._start = time.monotonic()

    def store(self, step: int, finished: bool) -> None:
        """Write how far the training is."""
        seconds = self._before + time.monotonic() - self._start
        write_json(self._run.path / PROGRESS, {"step": step, "seconds": round(seconds, 3), "finished": finished})
