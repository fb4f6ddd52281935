"""How y compares with each baseline, in words, from metrics by name (metrics.json)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ldae.evaluation.figures import PREDICTORS, UNITS

MAIN = re.compile(r"(?P<prefix>.*)baseline/(?P<baseline>[^/]+)/(?P<probe>[^/]+)/(?P<metric>auc|mae)")
METRIC_NAMES = {"auc": "area under the ROC curve", "mae": "mean absolute error"}
NAMES = {**PREDICTORS, "untrained": "encoder before training", "images": PREDICTORS["pca_images"]}
OURS = "y"


@dataclass(frozen=True)
class Comparison:
    """Predictors of one label by their main metric.

    Attributes:
        prefix: what the names of the metrics begin with, "" or for example "cv/inductive/".
        title: the label and the metric.
        rows: (predictor, its value, the difference to y), the best predictor first.
    """

    prefix: str
    title: str
    rows: list[tuple[str, str, str]]


def compare_in_words(metrics: Mapping[str, float]) -> list[Comparison]:
    """One comparison for each label and way of testing among the metrics, in the order of their names."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name in sorted(metrics):
        match = MAIN.fullmatch(name)
        ours = match and f"{match['prefix']}probe/{match['probe']}/{match['metric']}"
        if match and ours in metrics and match["baseline"] != "mean":
            groups.setdefault((match["prefix"], match["probe"], match["metric"]), []).append(match["baseline"])
    return [_compare(metrics, *key, baselines) for key, baselines in groups.items()]


def _compare(metrics: Mapping[str, float], prefix: str, probe: str, metric: str, baselines: list[str]) -> Comparison:
    ours = f"{prefix}probe/{probe}/{metric}"
    found = [(metrics[ours], OURS, _interval(metrics, ours), "")]
    for baseline in baselines:
        stem = f"{prefix}baseline/{baseline}/{probe}/{metric}"
        words = describe_difference(metrics, f"{stem}_difference", "y is better", "y is worse")
        if f"{stem}_gain" in metrics:
            added = describe_difference(metrics, f"{stem}_gain", "y adds to the components", "y takes away from them")
            words = f"{words}; {added}"
        found.append((metrics[stem], NAMES.get(baseline, baseline), _interval(metrics, stem), words))
    found.sort(key=lambda row: row[0], reverse=metric == "auc")
    unit = UNITS.get(probe, "")
    title = f"{probe}: {METRIC_NAMES[metric]}{f', {unit}' if unit else ''}"
    return Comparison(prefix, title, [row[1:] for row in found])


def describe_difference(metrics: Mapping[str, float], name: str, better: str, worse: str) -> str:
    """The difference with its interval; without a word of better or worse if the interval has 0 in it."""
    if name not in metrics:
        return ""
    value, low, high = (metrics.get(f"{name}{end}", float("nan")) for end in ("", "_low", "_high"))
    if low > 0:
        return f"{better} by {_interval(metrics, name)}"
    if high < 0:
        return f"{worse} by {-value:.3g} [{-high:.3g}, {-low:.3g}]"
    return f"no difference is shown: {_interval(metrics, name)}"


def _interval(metrics: Mapping[str, float], name: str) -> str:
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    text = f"{metrics[name]:.3g}"
    return text if low is None or high is None else f"{text} [{low:.3g}, {high:.3g}]"
