"""Finding the columns of tables that other programs wrote, and counting what was understood in them.

A column is found by its name whatever the case, spaces, hyphens, dots and underscores in it: "AGE_AT_SCAN" and "Age at
scan" are one name. Names with more in brackets, such as "Age (years)", are not taken: the log names them.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ldae.data.delimited import Row
from ldae.data.values import is_missing

# Names of the columns by what they contain; the first ones are those of BIDS and of the table of training.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "subject": (
        "subject", "participant_id", "subject_id", "participant", "sub", "subj", "subject_label", "patient",
        "patient_id", "src_subject_id", "ptid", "rid", "eid", "id",
    ),
    "session": (
        "session", "session_id", "ses", "ses_id", "session_label", "visit", "visit_id", "visit_code", "viscode2",
        "viscode", "timepoint", "tp", "eventname",
    ),
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "scan", "image", "image_path", "nifti",
             "t1w", "t1", "t1_path", "t1w_path"),
    "age": (
        "age", "age_at_session", "age_at_scan", "age_at_visit", "age_at_mri", "age_at_exam", "scan_age", "age_scan",
        "age_visit", "age_years",
    ),
    "baseline_age": ("age_bl", "age_at_baseline", "baseline_age", "age_baseline", "bl_age"),
    "sex": ("sex", "gender", "ptgender", "m/f", "sex_at_birth"),
    "diagnosis": ("diagnosis", "dx", "group", "dx_group", "diagnosis_group", "diagnostic_group", "dx_bl", "diag",
                  "label", "clinical_diagnosis"),
    "months": ("months", "month", "months_from_baseline", "months_since_baseline", "months_bl", "month_bl"),
    "date": ("acq_time", "acquisition_time", "acquisition_date", "acq_date", "scan_date", "exam_date", "mri_date",
             "session_date", "visit_date"),
}  # fmt: skip
# Names that standards prescribe for what identifies a row.
EXACT = {"subject": ("subject", "participant_id"), "session": ("session", "session_id"), "path": ("path",)}
SHOWN = 8  # names or values that a message shows
_SIMILAR = {
    "age": r"(?<![a-z])age", "diagnosis": r"diag|(?<![a-z])dx|group", "sex": r"(?<![a-z])sex|gender",
    "subject": r"subj|partic|patient|(?<![a-z])id(?![a-z])", "session": r"(?<![a-z])ses|visit|viscode|time",
}  # fmt: skip


def find_columns(header: Sequence[str], role: str, names: Sequence[str] | None = None) -> list[str]:
    """The columns of a header that contain `role`, in the order of the names.

    A column of EXACT is the only one, whichever others there are.

    Args:
        role: a key of SYNONYMS.
        names: the names to look for instead of the synonyms.
    """
    by_key: dict[str, list[str]] = {}
    for column in header:
        by_key.setdefault(_name_key(column), []).append(column)
    if names is None and (exact := [name for name in EXACT.get(role, ()) if name in header]):
        return exact[:1]
    keys = dict.fromkeys(map(_name_key, SYNONYMS[role] if names is None else names))
    return [column for key in keys for column in by_key.get(key, [])]


def find_unknown_columns(header: Sequence[str]) -> list[str]:
    """The columns whose names are not understood."""
    known = {column for role in SYNONYMS for column in find_columns(header, role)}
    return [column for column in header if column and column not in known]


def find_similar_columns(header: Sequence[str], role: str) -> list[str]:
    """The columns whose names resemble `role` but are not understood."""
    pattern = re.compile(_SIMILAR.get(role, role))
    return [column for column in find_unknown_columns(header) if pattern.search(_split_words(column))]


def select_cell(row: Row, columns: Sequence[str], parse: Callable[[str], object], remedy: str) -> str:
    """The first filled cell of several columns with the same content, "" if there is none.

    Args:
        parse: the value of a cell, by which cells are compared; ValueError if it is not understood.
        remedy: how to choose one of the columns, for the error.

    Raises:
        UserError: two columns have different values.
    """
    chosen, value = "", None
    for column in columns:
        cell = row.cells.get(column, "")
        found = _comparable_value(cell, parse) if len(columns) > 1 else None
        if found is not None and value is not None and found != value:
            raise row.error(column, f"{cell!r}, but column '{chosen}' has {row.cells[chosen]!r}: {remedy}")
        if (cell and not chosen) or (found is not None and value is None):
            chosen, value = column, found
    return row.cells[chosen] if chosen else ""


def _comparable_value(cell: str, parse: Callable[[str], object]) -> object:
    """The value of a cell whatever its case; None if it is missing or not understood."""
    try:
        value = None if is_missing(cell) else parse(cell)
    except ValueError:
        return None
    if value != value:  # NaN
        return None
    return value.casefold() if isinstance(value, str) else value


@dataclass
class ColumnReport:
    """Counts of what was understood in one kind of column.

    Attributes:
        role: what the column contains.
        columns: the columns that were read.
        header: all columns of the tables.
        found: number of values.
        missing: how often each cell was found that states no value.
        by_rule: how often each cell was found that is read by a rule, with the value.
        not_understood: how often each cell was found that follows no rule.
    """

    role: str
    columns: Sequence[str]
    header: Sequence[str]
    found: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    by_rule: Counter[str] = field(default_factory=Counter)
    not_understood: Counter[str] = field(default_factory=Counter)
    _total: int = 0

    def add(self, text: str, value: str | float, is_understood: bool = True, is_by_rule: bool = False) -> None:
        """Count a cell and the value that it, or another cell of its scan, gave; "" for none."""
        self.found += value != ""
        if not is_understood:
            self.not_understood[repr(text)] += 1
        elif value == "":
            self.missing[text] += 1
        elif is_by_rule:
            self.by_rule[f"{text} as {value:g}" if isinstance(value, float) else f"{text} as {value}"] += 1
        self._total += 1

    def similar_columns(self) -> list[str]:
        """The columns whose names resemble the role but are not understood."""
        return find_similar_columns(self.header, self.role)

    def describe(self) -> str:
        """One line, such as `age: 147 of 149 (Age): 1 by rule (89+ as 89); 1 missing (999)`."""
        line = f"{self.role}: {self.found} of {self._total}"
        if not self.columns:
            names = self.similar_columns() or find_unknown_columns(self.header)
            return f"{line}; the table has {list_some(names) if names else 'no such column'}"
        counts = (("by rule", self.by_rule), ("missing", self.missing), ("not understood", self.not_understood))
        parts = []
        for name, counter in counts:
            shown = [text for text, _ in counter.most_common() if text]
            if counter:
                parts.append(f"{counter.total()} {name}" + (f" ({list_some(shown)})" if shown else ""))
        return f"{line} ({', '.join(self.columns)})" + (f": {'; '.join(parts)}" if parts else "")


def list_some(names: Sequence[str]) -> str:
    """The first names of a list, and the number of the others."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _name_key(column: str) -> str:
    return re.sub(r"[\s_.-]+", "", column.casefold())


def _split_words(column: str) -> str:
    """A name in lower case, with a space where a capital starts a word: ageYears becomes "age years"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[\s_.-]+", " ", column).lower()
