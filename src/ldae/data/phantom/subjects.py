"""The subjects of a synthetic cohort: their labels, and the anatomy that follows from them.

A subject depends on (seed, number) only, so that cohorts of different sizes share their first subjects. Factors that
are independent of the labels (head size and individual differences of ventricles, hippocampi and sulci) are combined
with the effects of age and disease severity in `target_volumes`, the volumes that are rendered, and `sulcal_pattern`,
which says where the sulci are wide.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from ldae.utils.seeding import derive_seed

if TYPE_CHECKING:
    import pandas as pd

SESSIONS = (0, 6, 12, 24)  # months
DIAGNOSES = ("CN", "MCI", "AD")
SHARES = (0.4, 0.2, 0.4)
AGE_RANGE = (55.0, 88.0)  # at the first session
AGES = {"CN": (66.0, 13.0), "MCI": (71.0, 13.0), "AD": (77.5, 13.0)}  # mean and sd in years, before truncation
# Disease severity at the first session: mean, sd, lowest, highest; 0 = healthy, 1 = a typical AD patient.
SEVERITY = {"CN": (0.05, 0.1, 0.0, 0.28), "MCI": (0.5, 0.17, 0.2, 0.8), "AD": (1.0, 0.2, 0.65, 1.6)}
PROGRESSION = {"CN": 0.01, "MCI": 0.06, "AD": 0.09}  # severity per year
CONVERSION = {"CN": 0.3, "MCI": 0.82}  # severity above which a later session has the next diagnosis
SCANNERS = ("A", "B")

# Medians of cognitively normal people by age: lateral ventricles (mm3), both hippocampi (mm3), brain (mm3).
REFERENCE_AGES = (40, 50, 60, 70, 80, 90)
VENTRICLE = (16034, 17570, 21083, 29901, 41213, 51763)
HIPPOCAMPUS = (7748, 7698, 7566, 7332, 6900, 6186)
BRAIN = (1286e3, 1258e3, 1231e3, 1205e3, 1179e3, 1154e3)

HEAD = {"M": 1500e3, "F": 1345e3}  # mm3 inside the brain mask
HEAD_SD = 0.072  # this and the following are of the logarithm, those of the sulci are fractions of the head
HEAD_REFERENCE = 1418e3
HEALTHY = 0.08  # severity of the persons whose volumes are the reference
VENTRICLE_SD, VENTRICLE_DISEASE, VENTRICLE_HEAD = 0.40, 0.55, 1.0
VENTRICLE_LIMIT = 1e5  # mm3, approached smoothly: the deformation reaches no larger volumes
HIPPOCAMPUS_SD, HIPPOCAMPUS_DISEASE, HIPPOCAMPUS_HEAD = 0.084, -0.17, 0.5
SULCI_SD, SULCI_DISEASE, SULCI_RANGE = 0.011, 0.021, (0.085, 0.185)
# Where sulci are wide: strength in mm of the field that widens them at the back and narrows them in front. Ageing
# spares the precuneus and inferior temporal regions, Alzheimer's disease does not (Lee et al. 2019, doi
# 10.3389/fnagi.2019.00147). Both are smaller than the effects on all sulci (4.8 mm, and 2.4 mm per decade), so that
# the other side is affected as well, but less.
POSTERIOR_SD, POSTERIOR_DISEASE, POSTERIOR_DECADE = 2.5, 4.0, -1.5


@dataclass(frozen=True)
class Factors:
    """Everything that determines a subject's scan at one session.

    Attributes:
        seed, subject: the cohort's seed and the subject's number, from 1.
        months: since the first session.
        age: in years, at this session.
        severity: of the disease, 0 for a healthy person, 1 for a typical AD patient.
        head: volume of the head in mm3.
        ventricle, hippocampus, sulci, posterior: individual differences, standard normal.
    """

    seed: int
    subject: int
    months: int
    sex: str
    scanner: str
    age: float
    severity: float
    diagnosis: str
    head: float
    ventricle: float
    hippocampus: float
    sulci: float
    posterior: float

    def key(self, *what: str | int) -> int:
        """A seed for something random about this subject, named by `what`."""
        return derive_seed(self.seed, "phantom", self.subject, *what)

    def changed(self, severity: float | None = None, age: float | None = None) -> "Factors":
        """The same subject, session and scanner with another severity or age."""
        return replace(
            self,
            severity=self.severity if severity is None else float(severity),
            age=self.age if age is None else float(age),
        )


def _draw_bounded(rng: np.random.Generator, mean: float, sd: float, low: float, high: float) -> float:
    """Draw from a normal distribution until the value is within the bounds."""
    while not low <= (value := rng.normal(mean, sd)) <= high:
        pass
    return float(value)


@lru_cache(maxsize=4096)
def draw_subject(seed: int, subject: int, months: tuple[int, ...] | None = None) -> tuple[Factors, ...]:
    """Draw the sessions of a subject; `subject` counts from 1.

    Args:
        months: of the sessions, counted from the first visit; None: 0 and up to three later ones, drawn at random. The
            subject is the same whichever months are asked for.
    """
    rng = np.random.default_rng(derive_seed(seed, "phantom", subject, "labels"))
    baseline = str(rng.choice(DIAGNOSES, p=SHARES))
    sex, scanner = str(rng.choice(["F", "M"])), str(rng.choice(SCANNERS))
    age = round(_draw_bounded(rng, *AGES[baseline], *AGE_RANGE), 2)
    severity = _draw_bounded(rng, *SEVERITY[baseline])
    later = sorted(rng.choice(SESSIONS[1:], size=rng.integers(0, 4), replace=False).tolist())
    rng = np.random.default_rng(derive_seed(seed, "phantom", subject, "anatomy"))
    head, ventricle, hippocampus, sulci, posterior = rng.standard_normal(5).clip(-2.4, 2.4).tolist()
    head = HEAD[sex] * float(np.exp(HEAD_SD * head))
    sessions = []
    for month in (0, *later) if months is None else months:
        now = round(severity + PROGRESSION[baseline] * month / 12, 4)
        diagnosis = baseline
        if month and now > CONVERSION.get(baseline, np.inf):
            diagnosis = DIAGNOSES[DIAGNOSES.index(baseline) + 1]
        sessions.append(Factors(
            seed, subject, month, sex, scanner, round(age + month / 12, 2), now, diagnosis,
            head, ventricle, hippocampus, sulci, posterior,
        ))  # fmt: skip
    return tuple(sessions)


def target_volumes(factors: Factors) -> dict[str, float]:
    """The volumes that this subject is to have, in mm3: ventricle, hippocampus, brain, head."""
    size, disease = factors.head / HEAD_REFERENCE, factors.severity - HEALTHY
    ventricle, hippocampus, brain = (
        float(np.interp(factors.age, REFERENCE_AGES, values)) for values in (VENTRICLE, HIPPOCAMPUS, BRAIN)
    )
    # CSF outside the ventricles as a fraction of the head, so that large ventricles do not narrow the sulci.
    sulci = 1 - (brain + ventricle) / HEAD_REFERENCE + SULCI_SD * factors.sulci + SULCI_DISEASE * disease
    ventricle *= size**VENTRICLE_HEAD * np.exp(VENTRICLE_SD * factors.ventricle + VENTRICLE_DISEASE * disease)
    ventricle /= (1 + (ventricle / VENTRICLE_LIMIT) ** 6) ** (1 / 6)
    hippocampus *= size**HIPPOCAMPUS_HEAD
    hippocampus *= np.exp(HIPPOCAMPUS_SD * factors.hippocampus + HIPPOCAMPUS_DISEASE * disease)
    brain = factors.head * (1 - float(np.clip(sulci, *SULCI_RANGE))) - ventricle
    return {"ventricle": ventricle, "hippocampus": hippocampus, "brain": brain, "head": factors.head}


def sulcal_pattern(factors: Factors) -> float:
    """How much wider the sulci are at the back than in front, as strength in mm of the field of the sulci.

    It hardly changes the volumes.
    """
    disease, decades = factors.severity - HEALTHY, (factors.age - 70) / 10
    return POSTERIOR_SD * factors.posterior + POSTERIOR_DISEASE * disease + POSTERIOR_DECADE * decades


def table_row(factors: Factors, volumes: dict[str, float]) -> dict[str, object]:
    """The row of the table for one scan, without its paths."""
    return {
        "subject": f"sub-{factors.subject:04d}",
        "session": f"ses-M{factors.months:03d}",
        "diagnosis": factors.diagnosis,
        "age": factors.age,
        "sex": factors.sex,
        "scanner": factors.scanner,
        **{f"{name}_mm3": round(volumes[name], 1) for name in ("ventricle", "hippocampus", "brain", "head")},
        "severity": factors.severity,
        "phantom_seed": factors.seed,
    }


def draw_table(subjects: int, seed: int) -> "pd.DataFrame":
    """The table of a cohort with the target volumes, one row for each scan; nothing is rendered."""
    import pandas as pd

    drawn = (scan for subject in range(1, subjects + 1) for scan in draw_subject(seed, subject))
    return pd.DataFrame([table_row(factors, target_volumes(factors)) for factors in drawn])
