"""Participants' diagnosis, age and sex, from participants.tsv, sessions.tsv or the CSV of paths.

A session's own value takes precedence over the participant's. Ages are at the session: if only the age at another
session is known, the months between them are added. One age for sessions that are too far apart for it is that at the
first of them.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ldae.data.columns import ColumnReport, find_columns
from ldae.data.delimited import Row, exists_or_refuse
from ldae.data.subjects import SubjectIndex
from ldae.data.values import MAX_AGE, is_missing, unify_case
from ldae.preprocessing.participant_rows import Columns, ParticipantRow, override, parse_rows, read_participant_rows
from ldae.preprocessing.scan_rows import RowsOfScan, merge_rows, select_rows
from ldae.preprocessing.session_times import SessionOrder, SessionTime, order_sessions
from ldae.preprocessing.sources import SourceScan
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

SEX_REMEDY = "write M and F, or state the meaning of numbers as in --set 'preprocess.columns.sex_codes={0:F,1:M}'"


@dataclass(frozen=True)
class Participant:
    """A participant at one session.

    Attributes:
        months: since the first session, None if unknown.
        diagnosis, sex: "" if unknown.
        age: years at the session, NaN if unknown.
        problem: reason why the months are unknown, or "".
    """

    months: int | None
    diagnosis: str
    age: float
    sex: str
    problem: str = ""


class Participants:
    """The participants and sessions of a data set.

    Args:
        root: folder with participants.tsv (or .csv) and sub-*/sub-*_sessions.tsv, or None if the scans come with their
            own data.
        columns: names of the columns.
        participants: another file instead of root/participants.tsv; sessions are then sought beside it, too.

    Attributes:
        reason_empty: reason why the tables gave no scan an age or a diagnosis although they should have, or None; it is
            known after `look_up_all`.

    Raises:
        UserError: a file is missing, is not a table, or has no column of subjects.
    """

    def __init__(self, root: Path | None, columns: Columns, participants: Path | None = None) -> None:
        self.columns = columns
        self.roots = [folder for folder in (root, participants and participants.parent) if folder is not None]
        self.reason_empty: str | None = None
        self.path = participants or (_find_table(root) if root else None)
        if participants is not None and not exists_or_refuse(participants):
            raise UserError(f"no such file: {participants}")
        header, rows = read_participant_rows(self.path, columns) if self.path else ([], [])
        if header and not columns.find(header)["subject"]:
            raise UserError(
                f"{self.path}: no column of subjects in {', '.join(header)}: "
                f"call it participant_id, or name it with {override('subject', 'NAME')}"
            )
        self._header = dict.fromkeys(header)  # of all tables together
        self._listed: dict[str, list[ParticipantRow]] = defaultdict(list)  # by the subject as the table writes it
        for row in rows:
            if not is_missing(row.subject, codes=False):
                self._listed[row.subject].append(row)
        self._index = SubjectIndex(self._listed, str(self.path))
        self._sessions: dict[str, list[ParticipantRow]] = {}  # of sessions.tsv by subject, read when first needed
        self._metadata: dict[str, dict[Path, ParticipantRow]] = defaultdict(dict)  # of the CSV, by subject

    def look_up_all(self, scans: Sequence[SourceScan]) -> list[Participant]:
        """Find the participants of all scans, and log what was found in each column.

        Raises:
            UserError: a subject may be several participants, several rows fit one scan, or a column that was named does
                not exist.
        """
        self._read_metadata(scans)
        self._index.refuse_shared(scan.subject for scan in scans)
        labels: dict[str, dict[str, None]] = defaultdict(dict)
        for scan in scans:
            labels[scan.subject][scan.session] = None
        rows = [self._rows_of(scan, only=len(labels[scan.subject]) == 1) for scan in scans]
        self._refuse_missing_columns()
        orders = _order_sessions(scans, rows)
        found = [_describe(orders[scan.subject], scan, its_rows) for scan, its_rows in zip(scans, rows, strict=True)]
        diagnoses = unify_case([participant.diagnosis for participant in found])
        found = [replace(one, diagnosis=diagnosis) for one, diagnosis in zip(found, diagnoses, strict=True)]
        reports = [self._report(role, rows, found) for role in ("diagnosis", "age", "sex")]
        self._log(scans, reports)
        self.reason_empty = self._find_reason_empty(scans, reports)
        if self.reason_empty:
            log.warning("%s", self.reason_empty)
        return found

    def _refuse_missing_columns(self) -> None:
        for role in ("months", "date", "age", "baseline_age", "diagnosis", "sex"):
            names = getattr(self.columns, role)
            if names is not None and self._header and not find_columns(list(self._header), role, names):
                named, present = ", ".join(names), ", ".join(self._header)
                raise UserError(f"preprocess.columns.{role}: there is no column {named}; the tables have {present}")

    def _rows_of(self, scan: SourceScan, only: bool) -> RowsOfScan:
        listed = [row for subject in self._index.find(scan.subject) for row in self._listed[subject]]
        session, others = [], []
        if scan.metadata:
            rows = self._metadata[scan.subject]
            session.append(rows[scan.path])
            others += [row for row in rows.values() if row.session != scan.session]
        for rows in (self._sessions_of(scan.subject), [row for row in listed if row.session]):
            fitting = select_rows(rows, scan, only)
            session += fitting
            others += [row for row in rows if row not in fitting]
        return RowsOfScan(session, merge_rows([row for row in listed if not row.session], scan), others)

    def _read_metadata(self, scans: Sequence[SourceScan]) -> None:
        """Read the columns that came with scans, together: the coding of the sex depends on the whole column."""
        given = [scan for scan in scans if scan.metadata]
        header = dict.fromkeys(name for scan in given for name in scan.metadata)
        texts = [Row(scan.path, 1, scan.metadata) for scan in given]
        for scan, row in zip(given, parse_rows(list(header), texts, self.columns), strict=True):
            self._metadata[scan.subject][scan.path] = replace(row, session=scan.session)
        self._header |= header

    def _sessions_of(self, subject: str) -> list[ParticipantRow]:
        """The rows of sub-X_sessions.tsv."""
        if subject not in self._sessions:
            paths = (root / subject / f"{subject}_sessions.tsv" for root in self.roots)
            tables = (read_participant_rows(path, self.columns) for path in paths)
            header, self._sessions[subject] = next((table for table in tables if table[1]), ([], []))
            self._header |= dict.fromkeys(header)
        return self._sessions[subject]

    def _report(self, role: str, rows: Sequence[RowsOfScan], found: Sequence[Participant]) -> ColumnReport:
        """What was found of diagnosis, age or sex."""
        roles = (role, "baseline_age") if role == "age" else (role,)
        names = self.columns.find(list(self._header))
        report = ColumnReport(role, [name for part in roles for name in names[part]], list(self._header))
        for scan_rows, participant in zip(rows, found, strict=True):
            value = getattr(participant, role)
            texts = ((row, part) for row in scan_rows.own for part in roles if part in row.texts)
            row, part = next(texts, (None, role))
            report.add(
                row.texts[part] if row else "",
                value if value == value else "",
                is_understood=row is None or part not in row.not_understood,
                is_by_rule=row is not None and part in row.by_rule,
            )
        return report

    def _log(self, scans: Sequence[SourceScan], reports: Sequence[ColumnReport]) -> None:
        if not self._header:
            log.info("no table of participants: diagnosis, age and sex stay empty")
            return
        if self._listed:
            known = sum(bool(self._index.find(scan.subject)) for scan in scans)
            log.info("subject: %d of %d in %s", known, len(scans), self.path)
        for report in reports:
            log.info("%s", report.describe())
            if report.role == "sex" and report.not_understood:
                log.info("sex: %s", SEX_REMEDY)

    def _find_reason_empty(self, scans: Sequence[SourceScan], reports: Sequence[ColumnReport]) -> str | None:
        reports = [report for report in reports if report.role != "sex"]
        if not scans or any(report.found for report in reports):
            return None
        if self._listed and not any(self._index.find(scan.subject) for scan in scans):
            theirs, ours = next(iter(self._listed)), scans[0].subject
            return (
                f"{self.path}: none of its {len(self._listed)} participants ({theirs}, ...) is a subject of the scans "
                f"({ours}, ...): write them alike, or name their column with {override('subject', 'NAME')}"
            )
        if any(report.columns or report.similar_columns() for report in reports):
            lines = "; ".join(report.describe() for report in reports)
            similar = [override(report.role, name) for report in reports for name in report.similar_columns()]
            remedy = similar[0] if similar else override("age", "NAME")
            return f"no scan has an age or a diagnosis ({lines}): name a column with {remedy}"
        return None


def _find_table(root: Path) -> Path:
    """The table of participants in a folder, which may not exist."""
    paths = [root / f"participants.{ending}" for ending in ("tsv", "csv", "txt")]
    return next((path for path in paths if exists_or_refuse(path)), paths[0])


def _order_sessions(scans: Sequence[SourceScan], rows: Sequence[RowsOfScan]) -> dict[str, SessionOrder]:
    """The sessions of each subject in time."""
    times: dict[str, dict[str, SessionTime]] = defaultdict(dict)
    scanned: dict[str, dict[str, None]] = defaultdict(dict)
    for scan, its_rows in zip(scans, rows, strict=True):
        scanned[scan.subject][scan.session] = None
        for label, time in its_rows.times(scan).items():
            # What is about another scan's session is known better from that scan's own rows.
            if label == scan.session or label not in times[scan.subject]:
                times[scan.subject][label] = time
    return {subject: order_sessions(subject, times[subject], labels) for subject, labels in scanned.items()}


def _describe(order: SessionOrder, scan: SourceScan, rows: RowsOfScan) -> Participant:
    months = order.months.get(scan.session)
    age = rows.age(months)
    return Participant(
        months=months,
        diagnosis=next((row.diagnosis for row in rows.own if row.diagnosis), ""),
        age=round(age, 4) if 0 <= age <= MAX_AGE else math.nan,
        sex=next((row.sex for row in rows.own + rows.others if row.sex), ""),
        problem=order.problems.get(scan.session, ""),
    )
