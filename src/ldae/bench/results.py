"""From costs to the numbers of bench.json: speed-ups over the straight port, the table, and a comparison."""

import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from ldae.bench.measure import Cost
from ldae.utils.errors import UserError
from ldae.utils.files import read_json

log = logging.getLogger(__name__)

COLUMNS = {
    "ms": ".1f",
    "core_ms": ".1f",
    "scans_per_second": ".3g",
    "peak_mb": ".0f",
    "gflop": ".4g",
    "matrix_share": ".0%",
    "wait_share": ".1%",
}
Costs = Mapping[str, Mapping[str, Cost]]


def to_flat_numbers(costs: Costs, matrix_rates: Mapping[str, float]) -> dict[str, float]:
    """The numbers of bench.json: `task/...` of the last variant, `variant/task/...` of the others, and speed-ups.

    Args:
        costs: by variant, the straight port first, then by task.
        matrix_rates: FLOP/s of matrix products, by variant.
    """
    names = list(costs)
    found: dict[str, float] = {}
    for variant, tasks in costs.items():
        prefix = "" if variant == names[-1] else f"{variant}/"
        for task, cost in tasks.items():
            numbers = cost.numbers(matrix_rates[variant])
            found |= {f"{prefix}{task}/{name}": value for name, value in numbers.items()}
        found[f"matrix_gflops/{variant}"] = matrix_rates[variant] / 1e9
    for task in costs[names[0]] if names else ():
        having = [name for name in names if task in costs[name]]
        if names[-1] not in having or len(names) == 1:
            continue
        first, last = costs[names[0]][task], costs[names[-1]][task]
        found[f"speedup/{task}"] = _per_scan(first) / _per_scan(last)
        if last.busy:
            found[f"speedup_core/{task}"] = first.busy / first.scans / (last.busy / last.scans)
        for before, after in pairwise(having):
            found[f"gain/{after}/{task}"] = _per_scan(costs[before][task]) / _per_scan(costs[after][task])
    return found


def _per_scan(cost: Cost) -> float:
    return cost.seconds / cost.scans


def format_table(numbers: Mapping[str, float], variants: Sequence[str], tasks: Sequence[str]) -> str:
    """The table for the console: a line per task and variant, then the speed-ups."""
    rows = [("task", "variant", "ms", "core ms", "scans/s", "peak MB", "GFLOP", "of matrix rate", "waiting")]
    for task in tasks:
        for variant in variants:
            prefix = "" if variant == variants[-1] else f"{variant}/"
            if f"{prefix}{task}/ms" in numbers:
                figures = [format(numbers[f"{prefix}{task}/{name}"], spec) for name, spec in COLUMNS.items()]
                rows.append((task, variant, *figures))
    return f"{_aligned(rows)}\n\n{_gains(numbers, variants, tasks)}"


def _gains(numbers: Mapping[str, float], variants: Sequence[str], tasks: Sequence[str]) -> str:
    steps = variants[1:]
    rows = [("times faster", *steps, "together", "in core time")]
    for task in tasks:
        if f"speedup/{task}" in numbers:
            parts = [numbers.get(f"gain/{step}/{task}") for step in steps]
            ends = [numbers.get(f"{kind}/{task}") for kind in ("speedup", "speedup_core")]
            rows.append((task, *("" if p is None else f"{p:.2f}" for p in [*parts, *ends])))
    rows += [(name, *[""] * len(steps), f"{numbers[name]:.1f}", "") for name in sorted(numbers) if "over_voxel" in name]
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def compare_with_earlier(numbers: Mapping[str, float], against: Path | str, tolerance: float) -> tuple[str, list[str]]:
    """Compare milliseconds with those of an earlier bench.json.

    Args:
        against: the earlier bench.json.
        tolerance: a task is slower if its time has grown by more than this share.

    Returns:
        A table for the console, and the names of the tasks that have become slower.

    Raises:
        UserError: `against` is not a bench.json.
    """
    try:
        before = {name: float(value) for name, value in read_json(against).items()}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{against} is not a bench.json ({error}): give one that `make bench` wrote") from error
    rows, slower = [("task", "then, ms", "now, ms", "times faster")], []
    for name in sorted(numbers):
        if name.endswith("/ms") and name in before:
            gain = before[name] / numbers[name]
            mark = "" if gain >= 1 / (1 + tolerance) else "  slower"
            rows.append((name.removesuffix("/ms"), f"{before[name]:.1f}", f"{numbers[name]:.1f}", f"{gain:.2f}{mark}"))
            slower += [name.removesuffix("/ms")] if mark else []
    return _aligned(rows), slower
