"""metrics.json, and how its metrics are printed; html_report.py writes the page."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from ldae.utils.files import read_json, write_json

# Endings of the metrics worth a line on the console: the main metric of each probe, differences, and a few per topic.
HEADLINE = (
    "/auc", "/mae", "/auc_difference", "/mae_difference", "/auc_age_adjusted",
    "/ssim", "/ssim_mask", "_r", "error_ratio", "code/std", "_spearman_share", "/ventricle_error",
)  # fmt: skip
_INTERVAL_END = re.compile(r"_(low|high)$")


def merge_metrics(path: Path, new: Mapping[str, float]) -> None:
    """Merge `new` into the flat JSON file at `path`, atomically. Non-finite values are left out.

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


def select_headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The few metrics that belong on a console, with their intervals."""
    stems = [name for name in metrics if name.endswith(HEADLINE) or name.startswith("generation/")]
    wanted = {stem + suffix for stem in stems for suffix in ("", "_low", "_high")}
    return {name: value for name, value in metrics.items() if name in wanted}


def format_with_intervals(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(name, "value [low, high]") of every metric, sorted by name; without brackets if it has no interval."""
    rows = []
    for name in sorted(metrics):
        stem = _INTERVAL_END.sub("", name)
        if stem != name and stem in metrics:
            continue
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = f" [{_format(low)}, {_format(high)}]" if low is not None and high is not None else ""
        rows.append((name, _format(metrics[name]) + interval))
    return rows


def _format(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def format_console_table(metrics: Mapping[str, float]) -> str:
    """Names and values in two aligned columns, for the log."""
    rows = format_with_intervals(metrics)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
