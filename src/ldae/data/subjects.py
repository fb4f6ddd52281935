"""Subjects under the ways of writing them: sub-001, SUB-001, 001, 1 and 1.0 may be one person."""

import re
from collections.abc import Iterable

from ldae.utils.errors import UserError

_PREFIX = re.compile(r"sub-", re.IGNORECASE)
_PADDING = re.compile(r"(?<!\d)0+(?=\d)")
_NUMBER = re.compile(r"0*(\d+)(?:\.0+)?")


def subject_key(text: str) -> str:
    """A key that does not depend on the prefix `sub-`, on case, or on zeros before a number."""
    label = _PREFIX.sub("", text.strip(), count=1).casefold()
    number = _NUMBER.fullmatch(label)
    return number[1] if number else label


class SubjectIndex:
    """The subjects of a table, which are found by the label of a folder.

    A subject that is written as in the table is found first, then the only one with the same letters and digits
    whatever the prefix, the case and leading zeros.

    Args:
        subjects: as the table writes them.
        place: the table, for errors.
    """

    def __init__(self, subjects: Iterable[str], place: str) -> None:
        self._place = place
        self._levels: list[dict[str, list[str]]] = [{}, {}, {}, {}]
        for subject in dict.fromkeys(subjects):
            for groups, key in zip(self._levels, _keys(subject), strict=True):
                groups.setdefault(key, []).append(subject)

    def find(self, label: str) -> list[str]:
        """The spellings of a subject in the table; empty if it is not in it.

        Raises:
            UserError: several subjects of the table may be this one.
        """
        for number, (groups, key) in enumerate(zip(self._levels, _keys(label), strict=True)):
            found = groups.get(key, [])
            if number and len(found) > 1:
                names = " and ".join(map(repr, found))
                raise UserError(f"{self._place}: {label} may be {names}: write one of them as {label}")
            if found:
                return found
        return []

    def refuse_shared(self, labels: Iterable[str]) -> None:
        """Refuse labels of different folders that are found as one subject.

        Raises:
            UserError: there are such labels.
        """
        owners: dict[str, str] = {}
        for label in dict.fromkeys(labels):
            for subject in self.find(label):
                other = owners.setdefault(subject, label)
                if other != label:
                    raise UserError(f"{self._place}: {subject!r} may be {other} or {label}: write it as one of them")


def _keys(subject: str) -> tuple[str, ...]:
    """Keys from the strictest to the loosest.

    They are the label without prefix, without case and zeros before a number, with letters and digits only, and without
    zeros before any number in it.
    """
    key = subject_key(subject)
    letters = re.sub(r"[^a-z0-9]", "", key)
    return _PREFIX.sub("", subject.strip(), count=1), key, letters or key, _PADDING.sub("", letters) or key
