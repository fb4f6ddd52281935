"""What each section of report.html is about: its question, its figures, and its metrics in words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ldae.evaluation.report_terms import (
    ATTENTION,
    DECODER,
    FORECAST,
    GENERATION,
    INTERPOLATION,
    MANIPULATION,
    PREDICTION,
    RECONSTRUCTION,
    SEEDS,
    SELECTION,
    VARIATION,
)


@dataclass(frozen=True)
class Section:
    """One section of the report.

    Attributes:
        title, text: heading, and the question that the section answers.
        groups: what the names of its metrics begin with.
        prefixes, suffixes: what the names of its figures begin or end with.
        terms: parts of its metrics' names, with their meaning. In a part, <...> stands for any name.
    """

    title: str
    text: str
    groups: Sequence[str]
    prefixes: Sequence[str] = ()
    suffixes: Sequence[str] = ()
    terms: Mapping[str, str] = field(default_factory=dict)

    def has_metric(self, name: str) -> bool:
        """Whether a metric belongs to this section."""
        return any(name.startswith(f"{group}/") for group in self.groups)

    def terms_in(self, names: Sequence[str]) -> dict[str, str]:
        """The terms that occur in these names of metrics."""
        return {term: text for term, text in self.terms.items() if any(_occurs(term, name) for name in names)}


def _occurs(term: str, name: str) -> bool:
    pattern = "".join("*" if index % 2 else part for index, part in enumerate(term.replace("<", ">").split(">")))
    return fnmatchcase(f"/{name}/", f"*/{pattern}/*")


SECTIONS = (
    Section(
        "Another cohort",
        "How well do the frozen encoder, probes and baselines do on another cohort? Nothing was fitted on these scans.",
        ("external",),
        ("external_",),
        terms=PREDICTION,
    ),
    Section(
        "What the embedding predicts",
        "Which labels can be read from y? Linear probes on held-out test subjects, compared with baselines.",
        ("probe", "baseline"),
        suffixes=("_roc", "_confusion", "_scatter"),
        terms=PREDICTION,
    ),
    Section(
        "Cross-validation, inductive",
        "Probes and baselines in folds of scans that the encoder did not see during training.",
        ("cv/inductive",),
        ("cv_inductive",),
        terms=PREDICTION,
    ),
    Section(
        "Cross-validation, transductive",
        "Probes and baselines in folds of scans that the encoder saw, without labels, during training.",
        ("cv/transductive",),
        ("cv_transductive",),
        terms=PREDICTION,
    ),
    Section(
        "Several seeds",
        "What do runs with different seeds say together? The mean over the runs, with its interval over subjects.",
        ("seeds",),
        terms=SEEDS,
    ),
    Section(
        "Does the decoder use the embedding?",
        "A probe cannot tell: y may predict a diagnosis although the decoder ignores it. Here the same noisy latents "
        "are denoised with the scan's own y, with another subject's y and without y, and scans are decoded from y "
        "alone.",
        ("semantics", "gap"),
        ("semantics", "gap"),
        terms=DECODER,
    ),
    Section(
        "Attention of the encoder",
        "From which slices was y computed? Attention shows which slices contribute to y, not what in them matters.",
        ("attention",),
        ("attention",),
        terms=ATTENTION,
    ),
    Section(
        "Reconstruction",
        "How well are test scans restored, by sampler and number of steps? The autoencoder's own reconstruction is the "
        "best possible.",
        ("reconstruction",),
        ("reconstruction",),
        terms=RECONSTRUCTION,
    ),
    Section(
        "Variation",
        "What does y leave open? Each scan's y is decoded with different random codes.",
        ("variation",),
        ("variation",),
        terms=VARIATION,
    ),
    Section(
        "Manipulation",
        "Does an edit along a label's direction change a scan as the label changes a brain? alpha is the length of the "
        "edit: 1 is the mean distance between the two classes in the training scans, or one standard deviation of a "
        "number, unless the figure says otherwise; alpha > 0 goes towards the positive class or larger number. "
        "Difference maps: red = brighter, blue = darker, as a fraction of the intensity range. An edit shows what the "
        "model associates with the label, not what would happen to a person.",
        ("manipulation",),
        ("manipulation",),
        terms=MANIPULATION,
    ),
    Section(
        "Choice of direction and editor",
        "Which direction estimator and which editor settings change scans most like the true counterfactual, on "
        "validation subjects of a synthetic cohort?",
        ("selection",),
        ("selection",),
        terms=SELECTION,
    ),
    Section(
        "Interpolation through time",
        "Can the visit between two visits be predicted from them, by their position in time? On synthetic cohorts "
        "evaluation=[interpolation] uses fresh subjects with visits over years, of which no training has seen one.",
        ("interpolation",),
        ("interpolation",),
        terms=INTERPOLATION,
    ),
    Section(
        "Forecast",
        "Is a later visit foretold better than by the last one? How y moves a year was learned from pairs of visits of "
        "training subjects. The map of the standard deviation shows where the forecast is uncertain, by residuals of "
        "training pairs that it was not fitted on. It is what is expected of persons like this one, not a prognosis.",
        ("forecast",),
        ("forecast",),
        terms=FORECAST,
    ),
    Section(
        "Generation",
        "How close are synthetic scans to real ones, how different from each other, and are they copies?",
        ("generation",),
        ("generation",),
        terms=GENERATION,
    ),
)
OTHER = Section("Further metrics", "", ())
