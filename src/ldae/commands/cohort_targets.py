"""What can be predicted in a cohort of raw scans: the targets whose labels its tables have, known before any work."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from ldae.utils.errors import UserError

if TYPE_CHECKING:
    from ldae.preprocessing.participants import Participant

log = logging.getLogger(__name__)

MIN_SUBJECTS = 20  # for training and cross-validation, and with a known age
MIN_OF_CLASS = 5  # subjects of each class, one for each fold
DISEASES = ("AD", "PATIENT", "PATIENTS", "CASE")
HEALTHY = ("CN", "HC", "NC", "CTL", "CON", "CONTROL", "CONTROLS", "HEALTHY", "HEALTHY CONTROL", "NORMAL")
SEXES = ("F", "M")


@dataclass(frozen=True)
class Target:
    """A column of the table that probes predict.

    Attributes:
        name: of the probe and of its column: age, sex or diagnosis.
        classes: (negative, positive) of a diagnosis; None where the probe's own are right.
    """

    name: str
    classes: tuple[str, str] | None = None

    def overrides(self) -> list[str]:
        """Hydra overrides that choose the classes."""
        if self.classes is None:
            return []
        keys = (f"probe.{self.name}.negative", f"probe.{self.name}.positive")
        return [f"{key}={_quoted(value)}" for key, value in zip(keys, self.classes, strict=True)]


def choose_targets(subjects: Sequence[str], participants: "Sequence[Participant]", source: object) -> list[Target]:
    """The targets that enough subjects have labels of.

    Args:
        subjects: of each scan.
        participants: of each scan.
        source: what the scans are from, for messages.

    Raises:
        UserError: there are too few subjects, or no target at all.
    """
    count = len(set(subjects))
    if count < MIN_SUBJECTS:
        raise UserError(
            f"{source} has {count} subject{'s' * (count != 1)}: training and cross-validation need {MIN_SUBJECTS}"
        )
    by_subject = dict(reversed(list(zip(subjects, participants, strict=True))))  # the first scan of each subject
    people = list(by_subject.values())
    targets = []
    ages = [person.age for person in people if isfinite(person.age)]
    if len(ages) >= MIN_SUBJECTS and len(set(ages)) > 1:
        targets.append(Target("age"))
    else:
        log.warning("%s: %d of %d subjects have an age: age is not evaluated", source, len(ages), count)
    if min(_count(person.sex for person in people)[sex] for sex in SEXES) >= MIN_OF_CLASS:
        targets.append(Target("sex"))
    classes = choose_classes(person.diagnosis for person in people)
    if classes is not None:
        targets.append(Target("diagnosis", classes))
    if not targets:
        raise UserError(
            f"{source}: there is nothing to evaluate, because its tables have neither {MIN_SUBJECTS} ages nor "
            f"{MIN_OF_CLASS} subjects of each of two sexes or diagnoses: name the columns, as in "
            "--set 'preprocess.columns.age=[\"Age (years)\"]'"
        )
    return targets


def choose_classes(diagnoses: Iterable[str]) -> tuple[str, str] | None:
    """(negative, positive) of the diagnoses: the healthy, or the most frequent, against AD, or the next frequent.

    None if there are no two classes of enough subjects.
    """
    found = _count(diagnoses)
    names = [name for name, count in found.most_common() if name and count >= MIN_OF_CLASS]
    if len(names) < 2:
        return None
    negative = next((name for name in names if name.upper() in HEALTHY), None)
    positive = next((name for name in names if name.upper() in DISEASES), None)
    negative = negative or next(name for name in names if name != positive)
    return negative, positive or next(name for name in names if name != negative)


def _count(values: Iterable[str]) -> Counter[str]:
    return Counter(values)


def _quoted(text: str) -> str:
    """Text in quotes of Hydra's grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
