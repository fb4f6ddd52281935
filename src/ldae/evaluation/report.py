"""metrics.json: stored, merged and printed; html_report.py writes the page."""

import math
from collections.abc import Mapping
from pathlib import Path

from ldae.utils.files import read_json, write_json
from ldae.utils.metric_table import format_with_intervals


def merge_metrics(path: Path, new: Mapping[str, float]) -> None:
    """Merge `new` into the flat JSON file at `path`, atomically. Non-finite values are not stored.

    Metrics of an evaluation that is not run this time stay as they are; those of one that is run are replaced.
    """
    merged = read_metrics(path)
    for name, value in new.items():
        merged.pop(name, None)
        if math.isfinite(value):
            merged[name] = float(value)
    write_json(path, merged)


def read_metrics(path: Path) -> dict[str, float]:
    """The metrics in the file at `path`; none if there is no such file."""
    return read_json(path) if path.exists() else {}


def format_console_table(metrics: Mapping[str, float]) -> str:
    """Names and values in two aligned columns, for the log."""
    rows = format_with_intervals(metrics)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
