"""metrics.json and the table on the console; the report is page.py's."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from ldae.utils.files import read_json, write_json

_SUFFIX = re.compile(r"_(low|high)$")


def merge_metrics(path: Path, new: Mapping[str, float]) -> dict[str, float]:
    """Merge `new` into the flat JSON at `path`, atomically; numbers without a value (NaN, infinite) are left out.

    An evaluation that ran before and is not run now keeps its numbers; one that is run again replaces them.
    """
    merged = read_json(path) if path.exists() else {}
    for name, value in new.items():
        merged.pop(name, None)
        if math.isfinite(value):
            merged[name] = float(value)
    write_json(path, merged)
    return merged


def format_with_intervals(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(name, "value [low, high]") of every metric, in order; the interval where there is one."""
    rows = []
    for name in sorted(metrics):
        stem = _SUFFIX.sub("", name)
        if stem != name and stem in metrics:
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = f" [{_short(low)}, {_short(high)}]" if low is not None and high is not None else ""
        rows.append((name, _short(metrics[name]) + interval))
    return rows


def _short(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def format_console_table(metrics: Mapping[str, float]) -> str:
    """Two aligned columns, for the log."""
    rows = format_with_intervals(metrics)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
