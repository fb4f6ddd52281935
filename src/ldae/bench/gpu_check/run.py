"""Runs one measurement after the other until the budget ends."""

import fnmatch
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ldae.bench.gpu_check.check import FULL, GpuCheck, Size
from ldae.bench.gpu_check.items import Item, Outcome, run_item
from ldae.bench.gpu_check.machine import describe_machine, find_missing_packages
from ldae.bench.gpu_check.parts import PARTS
from ldae.bench.gpu_check.results import Results
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)
Chosen = list[tuple[str, Item]]


def choose_items(wanted: Sequence[str]) -> Chosen:
    """Measurements as (part, item) pairs.

    Args:
        wanted: names of parts, or "part/item" with wildcards, in the order in which they run.

    Raises:
        UserError: there is no measurement of that name.
    """
    chosen: Chosen = []
    for text in wanted:
        part, _, pattern = text.partition("/")
        found = [(part, item) for item in PARTS.get(part, []) if fnmatch.fnmatchcase(item.name, pattern or "*")]
        if not found:
            raise UserError(f"--parts: there is no {text!r}; parts are {', '.join(PARTS)}")
        chosen += [pair for pair in found if pair not in chosen]
    return chosen


def run_check(size: Size, wanted: Sequence[str], out: Path, budget: float) -> int:
    """Run measurements and write each result to `out` at once. Returns the number of failed measurements.

    Args:
        wanted: see `choose_items`.
        budget: seconds for all of them.

    Raises:
        UserError: there is no such part, or PyTorch is not installed.
    """
    chosen = choose_items(wanted)
    missing = find_missing_packages()
    if missing:
        log.warning("not installed: %s; `pip install %s`", ", ".join(missing), " ".join(missing))
    if "torch" in missing:
        raise UserError("torch is not installed: without it nothing can be measured")
    head = _head(describe_machine(), missing)
    log.info("%s", head)
    out.mkdir(parents=True, exist_ok=True)
    results = Results(out, list(PARTS), head)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="ldae-gpu-check-") as scratch:
        check = GpuCheck(size, out, Path(scratch), budget)
        for number, (part, item) in enumerate(chosen):
            outcome = run_item(item, check)
            results.add(part, item.name, outcome)
            log.info("%4.0f s  %s / %s: %s", budget - check.left, part, item.name, _line(outcome))
            failed += outcome.state == "failed"
            if outcome.state == "failed" and _device_is_lost():
                return failed + _continue_in_new_process(size, chosen[number + 1 :], out, check.left)
    return failed


def _head(machine: dict[str, str], missing: Sequence[str]) -> str:
    lines = ["# gpu-check", "", *(f"- {name}: {value}" for name, value in machine.items())]
    return "\n".join([*lines, *([f"- not installed: {', '.join(missing)}"] if missing else [])])


def _line(outcome: Outcome) -> str:
    if outcome.state != "done":
        return f"{outcome.state}: {outcome.reason.splitlines()[-1]}"
    shown = {name: value for name, value in outcome.numbers.items() if isinstance(value, str | int | float)}
    cells = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()]
    return f"{outcome.seconds:.1f} s  {'  '.join(cells)}"


def _device_is_lost() -> bool:
    """Whether this process can no longer use the GPU, as after some errors of a kernel."""
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _continue_in_new_process(size: Size, rest: Chosen, out: Path, left: float) -> int:
    """Run the remaining measurements in another process. Returns the number of failed ones."""
    if not rest:
        return 0
    log.warning("this process can no longer use the GPU: another one continues")
    parts = ",".join(f"{part}/{item.name}" for part, item in rest)
    command = [sys.executable, "-m", "ldae.bench.gpu_check", "--parts", parts, "--out", str(out)]
    command += ["--budget", str(left), "--size", "full" if size is FULL else "smoke"]
    return subprocess.run(command, check=False).returncode
