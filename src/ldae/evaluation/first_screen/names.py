"""What the names of metrics say: how a label was tested, which baseline is the best, along what scans were edited."""

import re
from collections.abc import Mapping

# Ways of testing, the most telling first: what the names of metrics begin with, and what is said about it.
REGIMES = {
    "": "on test subjects",
    "seeds/": "on test subjects, mean over runs",
    "cv/inductive/": "cross-validated on people whom the encoder never saw",
    "cv/transductive/": "cross-validated; the encoder saw these scans, without labels",
}
# Ways of testing, and then the label; probes of generated scans (generation/...) are none of these.
PREFIX = r"(?P<prefix>(?:seeds/)?(?:cv/\w+/|external/(?:[^/]+/)?)?)"
PROBE = re.compile(PREFIX + r"probe/(?P<probe>[^/]+)/(?P<metric>auc|mae)")
# These contain y or are parts of it, or use no features: no baselines for y.
NO_BASELINES = ("mean", "pca_view_and_y", "components", "residual")


def describe_regime(prefix: str) -> str:
    """On whom a metric whose name begins with `prefix` was measured, in words."""
    if prefix.startswith("seeds/") and prefix != "seeds/":
        return f"{REGIMES.get(prefix.removeprefix('seeds/'), prefix)}, mean over runs"
    return REGIMES.get(prefix, f"on another cohort ({prefix.rstrip('/')})")


def find_best_baseline(metrics: Mapping[str, float], prefix: str, probe: str, metric: str) -> str | None:
    """The baseline with the best value of a metric; None if there is none."""
    pattern = re.compile(rf"{re.escape(prefix)}baseline/([^/]+)/{re.escape(probe)}/{metric}")
    values = {match[1]: metrics[name] for name in sorted(metrics) if (match := pattern.fullmatch(name))}
    values = {name: value for name, value in values.items() if name not in NO_BASELINES}
    if not values:
        return None
    return (max if metric == "auc" else min)(values, key=lambda name: values[name])


def find_edited(metrics: Mapping[str, float]) -> list[str]:
    """The labels along whose directions scans were edited, diagnosis first, then age."""
    found = {match[1] for name in metrics if (match := re.match(r"manipulation/([^/]+)/", name))}
    return sorted(found, key=lambda name: (name != "diagnosis", name != "age", name))
