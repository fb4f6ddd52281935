"""The rules by which cells of tables become ages, sexes and diagnoses. Preprocessing and training share them.

missing     empty, n/a, NaN, ".", "?", unknown, and the codes -1, -4, -8, -9, -99, -999, -9999, 888, 999 and 9999
age         years. 71,5 has a decimal comma; 89+ is top-coded and read as 89; 60-64 is read as its middle, 62; 065Y,
            780M, 3400W and 23725D (DICOM) and 65 years, 65 y or 780 months have a unit
sex         M, male, man; F, female, woman; O, other; in any case. The numbers 1 and 2 are male and female (ISO/IEC
            5218) if the column has a 2 and no 0. Columns of 0 and 1 are coded in both ways, so they need `sex_codes`.
diagnosis   any text. Spellings that differ only in case become the most frequent one.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MAX_AGE = 130.0  # years; a larger number is not an age in years
MAX_RANGE = 20.0  # years; the middle of a wider range says little
_MISSING_WORDS = {
    "", "na", "n/a", "n.a.", "nan", "<na>", "#n/a", "null", "nil", ".", "-", "--", "?", "unknown", "unk", "missing",
    "not available", "not known",
}  # fmt: skip
_MISSING_CODES = {-1, -4, -8, -9, -99, -999, -9999, 888, 999, 9999}
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)
_COMMA = re.compile(r"\d{1,3},\d+")
_TOP_CODED = re.compile(r"(\d{1,3}(?:\.\d+)?) ?\+|(?:>=|≥) ?(\d{1,3})")
_RANGE = re.compile(r"(\d{1,3}(?:\.\d+)?) ?(?:-|–|to) ?(\d{1,3}(?:\.\d+)?)")
_WITH_UNIT = re.compile(r"(\d+(?:[.,]\d+)?) ?([a-z]+)\.?")
_UNITS = {
    **dict.fromkeys(("y", "yr", "yrs", "year", "years", "yo"), 1.0),
    **dict.fromkeys(("m", "mo", "mos", "month", "months"), 12.0),
    **dict.fromkeys(("w", "wk", "wks", "week", "weeks"), 365.25 / 7),
    **dict.fromkeys(("d", "day", "days"), 365.25),
}
_SEXES = {
    **dict.fromkeys(("m", "male", "man", "boy"), "M"),
    **dict.fromkeys(("f", "female", "woman", "girl"), "F"),
    **dict.fromkeys(("o", "other"), "O"),
}
_ISO_SEXES = {1.0: "M", 2.0: "F"}


@dataclass(frozen=True)
class Age:
    """An age.

    Attributes:
        years: NaN if it is missing.
        is_plain: whether it was written as a number of years with a decimal point, or is missing.
    """

    years: float
    is_plain: bool = True


def is_missing(text: str, codes: bool = True) -> bool:
    """Whether a cell states no value.

    Args:
        codes: whether numbers such as 999 state none. Among the numbers of subjects, 999 is one of them.
    """
    text = text.strip()
    is_code = codes and bool(_NUMBER.fullmatch(text)) and float(text) in _MISSING_CODES
    return is_code or text.casefold() in _MISSING_WORDS


def parse_age(text: str) -> Age:
    """Read an age.

    Raises:
        ValueError: it follows none of the rules, or is not between 0 and MAX_AGE years.
    """
    text = " ".join(text.split()).lower()
    if is_missing(text) or text == "none":
        return Age(math.nan)
    is_plain = bool(_NUMBER.fullmatch(text))
    years = float(text) if is_plain else _apply_age_rules(text)
    if not 0 <= years <= MAX_AGE:
        raise ValueError(f"{text!r} is not an age in years")
    return Age(years, is_plain)


def _apply_age_rules(text: str) -> float:
    """Years of an age that is not a plain number; NaN if no rule applies."""
    if _COMMA.fullmatch(text):
        return float(text.replace(",", "."))
    if match := _TOP_CODED.fullmatch(text):
        return float(match[1] or match[2])
    if match := _RANGE.fullmatch(text):
        low, high = float(match[1]), float(match[2])
        return (low + high) / 2 if low < high <= low + MAX_RANGE else math.nan
    if (match := _WITH_UNIT.fullmatch(text)) and match[2] in _UNITS:
        return round(float(match[1].replace(",", ".")) / _UNITS[match[2]], 4)
    return math.nan


def find_sex_codes(cells: Iterable[str]) -> dict[float, str]:
    """The meaning of the numbers in a column of sexes; empty if they are ambiguous."""
    found = {float(cell) for cell in cells if _NUMBER.fullmatch(cell) and not is_missing(cell)}
    return _ISO_SEXES if 2.0 in found and not found - {1.0, 2.0} else {}


def parse_sex(text: str, codes: Mapping[float, str]) -> str:
    """Read a sex: "M", "F" or "O", or "" if it is missing.

    Args:
        codes: meaning of numbers, see `find_sex_codes`.

    Raises:
        ValueError: it follows none of the rules.
    """
    word = text.strip().casefold()
    is_number = bool(_NUMBER.fullmatch(word))
    if is_number and float(word) in codes:
        return codes[float(word)]
    if is_missing(word) or word == "none":
        return ""
    if word in _SEXES:
        return _SEXES[word]
    reason = "is a number whose meaning is unknown" if is_number else "is not a sex"
    raise ValueError(f"{text!r} {reason}: write M or F")


def parse_diagnosis(text: str) -> str:
    """Read a diagnosis: its words separated by single spaces, or "" if it is missing."""
    return "" if is_missing(text) else " ".join(text.split())


def unify_case(values: Sequence[str]) -> list[str]:
    """Values in which spellings that differ only in case are replaced by the most frequent one.

    Of equally frequent spellings, the one with capitals is used.
    """
    counts = Counter(values)
    best: dict[str, str] = {}
    for value in sorted(counts, key=lambda value: (-counts[value], value)):
        best.setdefault(value.casefold(), value)
    return [best[value.casefold()] for value in values]
