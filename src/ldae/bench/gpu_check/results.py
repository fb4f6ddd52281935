"""The results, written after each measurement: a JSON file per part, and one table of all."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldae.bench.gpu_check.items import Outcome
from ldae.utils.files import read_json, write_json, write_text

Part = dict[str, dict[str, Any]]


class Results:
    """All results so far, including those of earlier calls.

    Args:
        folder: where they are written.
        parts: names of all parts, in the order of the table.
        head: text above the table.
    """

    def __init__(self, folder: Path, parts: list[str], head: str) -> None:
        self.folder = folder
        self.head = head
        self.parts: dict[str, Part] = {}
        for part in parts:
            path = folder / f"{part}.json"
            self.parts[part] = read_json(path) if path.exists() else {}

    def add(self, part: str, item: str, outcome: Outcome) -> None:
        """Store an outcome and write the files. A skipped measurement does not replace an earlier call's result."""
        if outcome.state == "skipped" and self.parts[part].get(item, {}).get("state") == "done":
            return
        self.parts[part][item] = outcome.to_dict()
        write_json(self.folder / f"{part}.json", self.parts[part])
        write_text(self.folder / "gpu_check.md", self.table())

    def table(self) -> str:
        """The table in Markdown."""
        parts = [f"## {name}\n\n{_part(part)}" for name, part in self.parts.items() if part]
        return "\n\n".join([self.head, *parts]) + "\n"


def _rows(part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and numbers of each row: one per measurement, or one per case that it measured."""
    for name, item in part.items():
        mark = "" if item["state"] == "done" else f" ({item['state']})"
        inner = {key: value for key, value in item["numbers"].items() if isinstance(value, dict)}
        own = {key: value for key, value in item["numbers"].items() if isinstance(value, str | int | float)}
        if own or not inner:
            yield f"{name}{mark}", {**own, "took_s": item["seconds"]}
        for key, values in inner.items():
            yield f"{name}: {key}", values


def _part(part: Part) -> str:
    rows = list(_rows(part))
    columns = list(dict.fromkeys(column for _, values in rows for column in values))
    cells = [[name, *(_cell(values.get(column, "")) for column in columns)] for name, values in rows]
    lines = [f"| {' | '.join(row)} |" for row in [["", *columns], ["---"] * (len(columns) + 1), *cells]]
    notes = []
    for name, item in part.items():
        for title, value in item["numbers"].items():
            if isinstance(value, list):
                notes.append(f"{name}, {title}:\n\n" + "\n".join(f"- {line}" for line in value or ["none"]))
        if item["reason"]:
            notes.append(f"{name}, {item['state']}:\n\n```\n{item['reason']}\n```")
    return "\n\n".join(["\n".join(lines), *notes])


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)
