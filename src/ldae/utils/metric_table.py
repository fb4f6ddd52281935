"""Metrics by flat name, as in metrics.json: which ones are shown first, and how they are printed with their intervals.

The ends of the interval of `name` are the metrics `name_low` and `name_high`.
"""

import re
from collections.abc import Mapping

# Endings of the metrics that are shown on the console and in the model card: the main metric of each probe,
# differences, and a few per topic.
HEADLINE = (
    "/auc", "/mae", "/auc_difference", "/mae_difference", "/auc_age_adjusted",
    "/ssim", "/ssim_mask", "_r", "error_ratio", "code/std", "_spearman_share", "/ventricle_error",
)  # fmt: skip
_INTERVAL_END = re.compile(r"_(low|high)$")


def select_headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are shown on the console and in the model card, with their intervals."""
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


def format_console_table(metrics: Mapping[str, float]) -> str:
    """Names and values in two aligned columns, for the log."""
    rows = format_with_intervals(metrics)
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _format(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"
