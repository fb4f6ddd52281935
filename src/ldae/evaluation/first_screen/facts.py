"""What a run was trained on, in words: how many people, of which cohort, in voxels of which size."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ldae.bundle.model_card import describe_provenance
from ldae.runs import Workspace

STAGES = ("aekl", "pretrain", "repr")


@dataclass(frozen=True)
class TrainingFacts:
    """A trained run.

    Attributes:
        table: file name of the table of scans.
        is_synthetic: whether the cohort consists of phantoms.
        people: number of subjects in each split.
        shape, spacing_mm: of the volumes; a spacing of None: each scan's own.
    """

    table: str
    is_synthetic: bool
    people: Mapping[str, int] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    spacing_mm: float | None = None

    @classmethod
    def of(cls, space: Workspace) -> Self:
        """The facts of the run in `space`, whose three stages are finished."""
        found = describe_provenance(space, {stage: space.predecessor(stage) for stage in STAGES})
        data: Mapping[str, Any] = found["data"]
        spacing = data["spacing_mm"]
        return cls(
            data["table"], bool(data["phantoms"]), data["subjects"], tuple(data["shape"]),
            float(spacing) if isinstance(spacing, int | float) else None,
        )  # fmt: skip

    def sentences(self) -> list[str]:
        """What was trained on whom, and on whom it was tested."""
        cohort = "synthetic brains, no person's scans" if self.is_synthetic else f"the cohort of {self.table}"
        people = self.people.get("train", 0)
        trained = f"Trained without labels on {count(people, 'person', 'people')}, {cohort}"
        if self.is_synthetic:
            trained = f"Trained without labels on {count(people, 'synthetic subject', 'synthetic subjects')} (phantoms)"
        size = f"voxels of {self.spacing_mm:g} mm" if self.spacing_mm else "voxels of each scan's own size"
        grid = f" ({' × '.join(map(str, self.shape))})" if self.shape else ""
        sentences = [f"{trained}, in {size}{grid}."]
        held = [f"{self.people[split]} for {name}" for split, name in HELD_OUT.items() if self.people.get(split)]
        if held:
            sentences.append(f"Held out by subject: {' and '.join(held)}.")
        return sentences


HELD_OUT = {"val": "choices", "test": "tests"}


def count(number: int, one: str, many: str) -> str:
    """`1 person`, `2 people`."""
    return f"{number:,} {one if number == 1 else many}"
