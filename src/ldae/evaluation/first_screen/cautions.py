"""What a reader should not trust, derived from the metrics by the rules of this module and no others.

Each rule is one function from `Evidence` to sentences; the thresholds are the constants below. A rule says nothing
where its metrics were not measured, except `_missing`, which says what was not measured at all.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ldae.evaluation.comparisons import NAMES
from ldae.evaluation.first_screen.facts import TrainingFacts, count
from ldae.evaluation.first_screen.headlines import MIN_SUBJECTS
from ldae.evaluation.first_screen.names import NO_BASELINES, PROBE, describe_regime, find_edited

MIN_TESTED = 50  # subjects; an AUC of 0.8 then has an interval of about +-0.13
MIN_TRAINED = 200  # subjects whom an encoder was trained on
MIN_EDITED = 20  # scans
MIN_SSIM = 0.9  # in the brain, of the autoencoder
MIN_RATIO = 1.1  # error with another subject's y over that with one's own
COARSE_MM = 3.0  # voxels of at least this size hold few voxels of a hippocampus
MAX_OUTSIDE = 0.1  # share of an edit's change outside of the structures, above that of the true change
MOST_OUTSIDE = 0.5  # the same where the true change is not known
SIZES = (0.5, 2.0)  # change of a structure over its true change, within which an edit counts as about right
MAX_OOD = 0.1  # share of the scans of another cohort that fail the out-of-distribution check
NAMED = 3  # baselines that are named
VISITS = (
    ("interpolation", "A visit between two visits", {"nearest": "the nearest visit", "voxel": "a blend of the scans"}),
    ("forecast", "A later visit", {"last": "the last visit", "mean_change": "the mean change of people"}),
)
WORDS = {"ventricle": "the ventricles", "hippocampus": "the hippocampi", "amygdala": "the amygdalae"}


@dataclass(frozen=True)
class Evidence:
    """What the rules read.

    Attributes:
        facts: None: not known.
    """

    metrics: Mapping[str, float]
    facts: TrainingFacts | None = None

    def get(self, name: str, otherwise: float = float("nan")) -> float:
        """A metric, or `otherwise`; every comparison with NaN is false."""
        return self.metrics.get(name, otherwise)


def find_cautions(evidence: Evidence) -> list[str]:
    """Everything that is not to be trusted, the most serious first; each a sentence or two."""
    return [sentence for rule in RULES for sentence in rule(evidence)]


def _synthetic(evidence: Evidence) -> Iterator[str]:
    if evidence.facts is not None and evidence.facts.is_synthetic:
        yield "The training scans are synthetic. Nothing here says how the method does when trained on real brains."


def _unused_y(evidence: Evidence) -> Iterator[str]:
    low = evidence.get("semantics/z0_error_ratio_low", evidence.get("semantics/z0_error_ratio"))
    if low < MIN_RATIO:
        yield "The decoder hardly uses y: edits, interpolations and scans decoded from y show little of what y says."


def _better_baselines(evidence: Evidence) -> Iterator[str]:
    """Baselines that beat y, or that y is not shown to beat, of each label and way of testing."""
    metrics = evidence.metrics
    for match in _probes(metrics):
        prefix, probe, metric = match["prefix"], match["probe"], match["metric"]
        better, within = [], []
        pattern = re.compile(rf"{re.escape(prefix)}baseline/([^/]+)/{re.escape(probe)}/{metric}_difference")
        matches = [match for name in metrics if (match := pattern.fullmatch(name)) and match[1] not in NO_BASELINES]
        for found in sorted(matches, key=lambda one: metrics[one[0]]):  # the best baseline first
            low, high = evidence.get(f"{found[0]}_low"), evidence.get(f"{found[0]}_high")
            label = NAMES.get(found[1], found[1])
            better += [label] if high < 0 else []
            within += [label] if low <= 0 <= high else []
        where = describe_regime(prefix)
        if better:
            yield f"{probe.capitalize()}, {where}: y is worse than {_join(_first(better))}."
        if within:
            yield f"{probe.capitalize()}, {where}: y is not shown to be better than {_join(_first(within))}."


def _few_tested(evidence: Evidence) -> Iterator[str]:
    few: dict[str, list[str]] = {}
    for match in _probes(evidence.metrics):
        subjects = evidence.get(f"{match['prefix']}probe/{match['probe']}/subjects")
        if subjects < MIN_TESTED:
            few.setdefault(match["prefix"], []).append(f"{match['probe']} {subjects:.0f}")
    for prefix, numbers in few.items():
        yield f"Few people, {describe_regime(prefix)} ({', '.join(numbers)}): the intervals are wide."


def _few_trained(evidence: Evidence) -> Iterator[str]:
    people = evidence.facts.people.get("train", 0) if evidence.facts else 0
    if 0 < people < MIN_TRAINED:
        yield f"Trained on {people} people only: y may miss what is rare, and another draw of people may change it."


def _one_cohort(evidence: Evidence) -> Iterator[str]:
    """Scans that the encoder saw, and scans that are unlike those it was trained on."""
    metrics = evidence.metrics
    if any(name.startswith("cv/transductive/") for name in metrics):
        yield "Numbers that are called transductive are of scans that the encoder was trained on, without labels."
    people = evidence.facts.people if evidence.facts else {}
    if people and not people.get("test") and find_edited(metrics):
        yield "No test subjects: the edited scans are among those that the model and the directions were fitted on."
    for name in sorted(metrics):
        match = re.fullmatch(r"(external/(?:[^/]+/)?)ood/failed", name)
        share = metrics[name] / max(evidence.get(f"{match[1]}ood/scans"), 1.0) if match else 0.0
        if share > MAX_OOD:
            yield f"{share:.0%} of the scans of {match[1].rstrip('/')} are unlike the training scans."


def _blur(evidence: Evidence) -> Iterator[str]:
    ssim = evidence.get("reconstruction/autoencoder/ssim_mask")
    if ssim < MIN_SSIM:
        yield (
            f"The autoencoder blurs: a scan that only passes through it has a structural similarity of {ssim:.2f} in "
            "the brain. No decoded image shows finer details."
        )
    spacing = evidence.facts.spacing_mm if evidence.facts else None
    if spacing is not None and spacing >= COARSE_MM:
        yield f"Voxels of {spacing:g} mm: hippocampi and smaller structures are a few voxels thick."


def _edits(evidence: Evidence) -> Iterator[str]:
    """Edits that move structures not at all, too little or too much, that move other regions, or that are few."""
    for probe in find_edited(evidence.metrics):
        stem = f"manipulation/{probe}"
        still = [_word(match[1]) for match in _matches(evidence.metrics, stem, "moves") if not evidence.get(match[0])]
        if still:
            yield f"Edits along {probe} do not move {_join(still)} as they should: do not read them there."
        sizes = [
            f"{_word(match[1])} {evidence.get(match[0]):.2f} times"
            for match in _matches(evidence.metrics, stem, "slope_ratio")
            if _word(match[1]) not in still and not SIZES[0] <= evidence.get(match[0]) <= SIZES[1]
        ]
        if sizes:
            yield f"Edits along {probe} have another size than the true change: {_join(sizes)} as much."
        outside, true = evidence.get(f"{stem}/outside_share"), evidence.get(f"{stem}/outside_share_true")
        if outside > true + MAX_OUTSIDE or (true != true and outside > MOST_OUTSIDE):
            beside = "" if true != true else f" (of the true change: {true:.0%})"
            yield f"{outside:.0%} of what edits along {probe} change is outside of ventricles and hippocampi{beside}."
        if evidence.get(f"{stem}/independent_right_low", evidence.get(f"{stem}/independent_right")) <= 0.5:
            yield f"Embedded again, edits along {probe} are not read as edited by a probe of other scans."
        scans = evidence.get(f"{stem}/scans")
        if scans < MIN_EDITED:
            yield f"Edits along {probe} were measured on {scans:.0f} scans only."


def _visits(evidence: Evidence) -> Iterator[str]:
    """Visits that are predicted no better than without a model."""
    for task, visit, baselines in VISITS:
        subjects = evidence.get(f"{task}/subjects")
        if subjects < MIN_SUBJECTS:
            yield f"{visit} was predicted for {count(int(subjects), 'person', 'people')} only: that says little."
            continue
        for method, words in baselines.items():
            stem = f"{task}/gain/real/ssim_mask_over_{method}"
            if evidence.get(f"{stem}_high") < 0:
                yield f"{visit} is predicted worse than by {words}."
            elif evidence.get(f"{stem}_low") <= 0:
                yield f"{visit} is not shown to be predicted better than by {words}."


def _missing(evidence: Evidence) -> Iterator[str]:
    groups = {name.split("/")[0] for name in evidence.metrics}
    absent = [
        words
        for names, words in (
            ({"probe", "cv", "external", "seeds"}, "what y predicts"),
            ({"semantics"}, "whether the decoder uses y"),
            ({"manipulation"}, "edits"),
        )
        if not names & groups
    ]
    if absent:
        yield f"Not measured: {_join(absent)}."
    if "seeds" not in groups and {"probe", "cv"} & groups:
        yield "One training run: how much the numbers change with the seed was not measured."


# The order in which a reader sees them.
RULES: tuple[Callable[[Evidence], Iterator[str]], ...] = (
    _synthetic, _unused_y, _better_baselines, _few_tested, _few_trained, _one_cohort, _blur, _edits, _visits,
    _missing,
)  # fmt: skip


def _probes(metrics: Mapping[str, float]) -> list[re.Match[str]]:
    """Main metrics of the probes, those that are averaged over seeds left out."""
    matches = [match for name in sorted(metrics) if (match := PROBE.fullmatch(name))]
    return [match for match in matches if not match["prefix"].startswith("seeds/")]


def _matches(metrics: Mapping[str, float], stem: str, end: str) -> list[re.Match[str]]:
    """The metrics `<stem>/<structure>_<end>`."""
    pattern = re.compile(rf"{re.escape(stem)}/(\w+)_{end}")
    return [match for name in sorted(metrics) if (match := pattern.fullmatch(name))]


def _word(structure: str) -> str:
    return WORDS.get(structure, f"the {structure.replace('_', ' ')}s")


def _first(words: Sequence[str]) -> list[str]:
    """The first of them, and how many there are besides."""
    more = len(words) - NAMED
    return list(words) if more <= 1 else [*words[:NAMED], f"{more} other baselines"]


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
