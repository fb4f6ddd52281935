"""Names of metrics in words: `probe/age/mae` is "predictions from y by a linear probe; age; mean absolute error"."""

import re
from collections.abc import Mapping


def describe_metric(name: str, terms: Mapping[str, str]) -> str:
    """What the parts of a metric's name mean, those that are not among `terms` as they are.

    Args:
        terms: parts of names with their meaning; in a part, <...> stands for any name.
    """
    return "; ".join(_describe_part(part, terms) for part in name.split("/"))


def _describe_part(part: str, terms: Mapping[str, str]) -> str:
    if part in terms:
        return terms[part]
    for term, text in terms.items():
        match = re.fullmatch(_pattern(term), part) if "<" in term else None
        if match:
            inner = [terms.get(word, word.replace("_", " ")) for word in match.groups()]
            return f"{', '.join(inner)}: {text}"
    return part.replace("_", " ")


def _pattern(term: str) -> str:
    """A regular expression for a term, each <...> a group."""
    pieces = re.split(r"<\w+>", term)
    return "(.+)".join(re.escape(piece) for piece in pieces)
