"""Which scans of a list are preprocessed, one or more for each session, and which cannot be used."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ldae.data.columns import find_columns
from ldae.data.sessions import session_label
from ldae.preprocessing.job import Job
from ldae.preprocessing.participants import Participant, Participants
from ldae.preprocessing.regions import find_label_maps, label_map_of
from ldae.preprocessing.session_scans import Row, SessionScans, group_scans
from ldae.preprocessing.sources import SourceScan
from ldae.utils.shards import Shard

# Contents of columns that have a place of their own in the table; other columns of the source are copied to it.
PLACED_ROLES = ("subject", "session", "path", "diagnosis", "age", "sex")


@dataclass(frozen=True)
class CohortPlan:
    """The sessions of a list of scans.

    Attributes:
        sessions: to preprocess.
        unusable: scans that cannot be used, each in a session of its own.
    """

    sessions: Sequence[SessionScans]
    unusable: Sequence[SessionScans]

    def part_of(self, shard: Shard) -> "CohortPlan":
        """What one of several jobs does."""
        return CohortPlan(shard.take(self.sessions), shard.take(self.unusable))

    def without_foreign(self, job: Job) -> "CohortPlan":
        """The same plan; sessions under whose names another list has put other scans in `job.out` are unusable."""
        free, foreign = [], []
        for session in self.sessions:
            other = job.find_foreign(session)
            if other is None:
                free.append(session)
                continue
            problem = (
                f"{job.out} has another scan of {session.first.subject} {session.first.session}".rstrip()
                + f" from {other['listed_in']}: choose another output folder, or remove that scan's record"
            )
            foreign.append(SessionScans((replace(session.first, problem=problem),)))
        return CohortPlan(free, [*self.unusable, *foreign])

    def record_paths(self, job: Job) -> list[list[Path]]:
        """For each session the records that its scans may have, relative to the output folder."""
        return [[job.outputs(scan).names.record for scan in session.scans] for session in self.sessions]

    def digest(self, job: Job) -> str:
        """A name for this plan and the parameters of `job`: the same in all jobs that share the work."""
        parts = [job.listed_in, job.steps.key(), job.choice.name]
        parts += [os.fspath(scan.path) for session in (*self.sessions, *self.unusable) for scan in session.scans]
        return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]


def plan_cohort(
    scans: Sequence[SourceScan], participants: Participants, job: Job, labels: Path | None = None
) -> CohortPlan:
    """Group scans by session, with what the tables of participants say about them.

    Args:
        labels: folder of label maps, see `regions.find_label_maps`.

    Raises:
        UserError: `labels` is ambiguous.
    """
    label_maps = find_label_maps(labels) if labels else {}
    problems = [scan for scan in scans if scan.problem]
    scans = [scan for scan in scans if not scan.problem]
    found = participants.look_up_all(scans)
    usable, rows = [], []
    for scan, participant in zip(scans, found, strict=True):
        if participant.problem:
            problems.append(replace(scan, problem=participant.problem))
        else:
            usable.append(scan)
            rows.append(_row(scan, participant))
    sessions = group_scans(usable, rows, job.choice, lambda scan: label_map_of(scan, label_maps))
    return CohortPlan(sessions, [SessionScans((scan,)) for scan in problems])


def _row(scan: SourceScan, participant: Participant) -> Row:
    """The cells of the table that do not depend on preprocessing."""
    placed = _placed_columns(tuple(scan.metadata))
    return {
        "session": session_label(participant.months or 0),
        "diagnosis": participant.diagnosis,
        "age": participant.age if math.isfinite(participant.age) else None,
        "sex": participant.sex,
        **{name: cell for name, cell in scan.metadata.items() if name not in placed},
    }


@cache  # all scans of a list have the same columns
def _placed_columns(header: tuple[str, ...]) -> frozenset[str]:
    return frozenset(name for role in PLACED_ROLES for name in find_columns(list(header), role))
