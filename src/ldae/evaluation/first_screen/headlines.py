"""The six numbers that a report begins with, each beside what it has to be compared with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

from ldae.evaluation.comparisons import METRIC_NAMES, NAMES, describe_difference
from ldae.evaluation.figures import UNITS
from ldae.evaluation.first_screen.names import (
    PROBE,
    REGIMES,
    describe_regime,
    find_best_baseline,
    find_edited,
)

COUNT = 6
MIN_SUBJECTS = 5  # with fewer, an interval over subjects says nothing
METHODS = {
    "nearest": "nearest visit",
    "voxel": "blend of scans",
    "last": "last visit unchanged",
    "mean_change": "mean change of people",
    "latent": "latents alone",
}


@dataclass(frozen=True)
class Value:
    """A number with its interval, and what it is of."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def read(cls, label: str, metrics: Mapping[str, float], name: str) -> "Value":
        """The metric `name`, which exists."""
        return cls(label, metrics[name], metrics.get(f"{name}_low"), metrics.get(f"{name}_high"))

    @property
    def text(self) -> str:
        """`0.93 [0.90, 0.96]`."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"


@dataclass(frozen=True)
class Headline:
    """One number of the first screen.

    Attributes:
        title: what it says, in words.
        unit: of the number, and which direction is better.
        ours: the number.
        other: the best baseline, or what bounds the number; None if nothing was measured.
        verdict: how they compare, in words; "" without a paired comparison.
        start, end: of the axis.
        key: name of the metric.
    """

    title: str
    unit: str
    ours: Value
    other: Value | None
    verdict: str
    start: float
    end: float
    key: str


def choose_headlines(metrics: Mapping[str, float]) -> list[Headline]:
    """At most six headlines, the most telling that were measured."""
    return list(islice(_candidates(metrics), COUNT))


def _candidates(metrics: Mapping[str, float]) -> Iterator[Headline]:
    probes = list(_probe_headlines(metrics))
    yield from probes[:2]
    yield from _single(
        metrics, "semantics/ssim_mask", "Scan decoded from y alone, against the scan",
        "structural similarity in the brain, 1 = identical", "reconstruction/autoencoder/ssim_mask",
        "autoencoder, the limit",
    )  # fmt: skip
    yield from _single(
        metrics, "semantics/ventricle_r", "Ventricles decoded from y alone, against the scan's",
        "correlation of the volumes, 1 = perfect", "semantics/ventricle_r_control", "with another subject's y",
    )  # fmt: skip
    yield from _edit_headline(metrics)
    yield from _visit_headline(metrics, "forecast", "Later visit foretold from an earlier one")
    yield from _visit_headline(metrics, "interpolation", "Visit predicted from those before and after")
    yield from _single(
        metrics, "semantics/z0_error_ratio", "Error with another subject's y, over that with one's own",
        "times; 1 = the decoder ignores y",
    )  # fmt: skip
    if "semantics/ssim_mask" not in metrics:
        yield from _single(
            metrics, "reconstruction/autoencoder/ssim_mask", "Scan through the autoencoder, against the scan",
            "structural similarity in the brain, 1 = identical",
        )  # fmt: skip
    yield from probes[2:]


def _single(
    metrics: Mapping[str, float], name: str, title: str, unit: str, other: str = "", label: str = ""
) -> Iterator[Headline]:
    """The headline of one metric, if it was measured."""
    if name in metrics:
        beside = Value.read(label, metrics, other) if other in metrics else None
        ours = Value.read("this model", metrics, name)
        yield Headline(title, unit, ours, beside, "", 0.0, _end(ours, beside), name)


def _end(ours: Value, other: Value | None) -> float:
    """End of an axis on which everything has room; 1 for what cannot exceed 1."""
    largest = max(end for value in (ours, other) if value for end in (value.value, value.high or value.value))
    return 1.0 if largest <= 1 else 1.05 * largest


def _probe_headlines(metrics: Mapping[str, float]) -> Iterator[Headline]:
    """Each label once, by the most telling way of testing it; the run's own cohort before others."""
    found: dict[str, tuple[str, str]] = {}
    matches = [match for name in sorted(metrics) if (match := PROBE.fullmatch(name))]
    order = {prefix: number for number, prefix in enumerate(REGIMES)}
    for match in sorted(matches, key=lambda one: order.get(one["prefix"], len(order))):
        found.setdefault(match["probe"], (match["prefix"], match["metric"]))
    for probe in sorted(found, key=lambda name: (name != "diagnosis", name != "age", name)):
        yield _probe_headline(metrics, *found[probe][:1], probe, found[probe][1])


def _probe_headline(metrics: Mapping[str, float], prefix: str, probe: str, metric: str) -> Headline:
    key, best = f"{prefix}probe/{probe}/{metric}", find_best_baseline(metrics, prefix, probe, metric)
    ours, other, verdict = Value.read("y", metrics, key), None, ""
    if best is not None:
        stem = f"{prefix}baseline/{best}/{probe}/{metric}"
        other = Value.read(NAMES.get(best, best), metrics, stem)
        verdict = describe_difference(metrics, f"{stem}_difference", "y is better", "y is worse")
    where = describe_regime(prefix)
    name, unit = METRIC_NAMES[metric], UNITS.get(probe, "")
    if metric == "auc":
        return Headline(
            f"{probe.capitalize()} read from y, {where}",
            f"{name}; 0.5 = chance, 1 = perfect",
            ours,
            other,
            verdict,
            0.5,
            1.0,
            key,
        )
    words = f"{name}{f', {unit}' if unit else ''}; lower is better"
    return Headline(
        f"{probe.capitalize()} read from y, {where}", words, ours, other, verdict, 0.0, _end(ours, other), key
    )


def _edit_headline(metrics: Mapping[str, float]) -> Iterator[Headline]:
    """Edits against the true counterfactual of phantoms, else the share of scans that change in the right direction."""
    for probe in find_edited(metrics):
        stem = f"manipulation/{probe}"
        if f"{stem}/difference_r" in metrics:
            yield from _single(
                metrics, f"{stem}/difference_r", f"Edits along {probe}, against the true change",
                "correlation of decoded and true change, 1 = perfect", f"{stem}/difference_r_ceiling",
                "autoencoder, the limit",
            )  # fmt: skip
            return
        for structure, words in (("hippocampus", "hippocampi"), ("ventricle", "ventricles")):
            if f"{stem}/{structure}_right" in metrics:
                yield from _single(
                    metrics, f"{stem}/{structure}_right", f"Edits along {probe}: {words} that change rightly",
                    "share of scans with the right sign; 0.5 = chance",
                )  # fmt: skip
                return


def _visit_headline(metrics: Mapping[str, float], task: str, title: str) -> Iterator[Headline]:
    """A visit that was predicted, beside the best of the methods that need no model."""
    if metrics.get(f"{task}/subjects", MIN_SUBJECTS) < MIN_SUBJECTS:
        return
    key = f"{task}/{{}}/real/ssim_mask"
    others = {method: metrics[key.format(method)] for method in METHODS if key.format(method) in metrics}
    best = max(others, key=lambda method: others[method]) if others else ""
    for headline in _single(
        metrics, key.format("ldae"), title, "structural similarity in the brain, 1 = identical", key.format(best),
        METHODS.get(best, ""),
    ):  # fmt: skip
        gain = f"{task}/gain/real/ssim_mask_over_{best}"
        yield replace(
            headline, verdict=describe_difference(metrics, gain, "this model is better", "this model is worse")
        )
