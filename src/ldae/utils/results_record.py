"""evaluations.json: which evaluation wrote which metrics and files of a folder, and what they were computed from.

With it an evaluation that is run again replaces everything that it wrote before, and results of other weights or scans
are told from present ones.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from ldae.utils.errors import UserError
from ldae.utils.files import read_json, write_json

METRICS = "metrics.json"
RECORD = "evaluations.json"


@dataclass(frozen=True)
class Source:
    """What results were computed from.

    Attributes:
        weights: SHA-256 of the weights of each network, by its name.
        table: the table of the scans, as it was given.
        rows: hash of the table's values and of the versions of the scans and label maps that it names.
        split_hash: of the split by subject.
        scans: number of scans in each split.
    """

    weights: dict[str, str] = field(default_factory=dict)
    table: str = ""
    rows: str = ""
    split_hash: str = ""
    scans: dict[str, int] = field(default_factory=dict)

    @property
    def description(self) -> str:
        """In words: table, number of scans, and the beginnings of the hashes."""
        counts = ", ".join(f"{self.scans[split]} {split}" for split in ("train", "val", "test") if split in self.scans)
        weights = ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(self.weights.items()))
        table = self.table.replace("\\", "/").rsplit("/", 1)[-1]
        return (
            f"{table}, {sum(self.scans.values())} scans ({counts}), rows {self.rows[:12]}, "
            f"split {self.split_hash[:12]}; weights: {weights}"
        )


@dataclass(frozen=True)
class Results:
    """What one evaluation wrote.

    Attributes:
        source: what it was computed from.
        metrics: names in metrics.json.
        files: names in the folder.
        skipped: what was not computed, each with the reason.
        command: the command line that computed it; "" if it is not known.
    """

    source: Source
    metrics: list[str]
    files: list[str]
    skipped: list[str]
    command: str = ""

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        lists = {name: [str(item) for item in value[name]] for name in ("metrics", "files", "skipped")}
        if any(Path(name).name != name for name in lists["files"]):
            raise ValueError("a file outside of its folder")
        return cls(Source(**value["source"]), **lists, command=str(value.get("command", "")))


def read_record(folder: Path) -> dict[str, Results]:
    """The results in `folder` by evaluation; empty if an earlier version of this project wrote them, or none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return {}
    try:
        return {name: Results.from_dict(value) for name, value in read_json(path).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it and run evaluate.py again") from error


def write_record(folder: Path, record: Mapping[str, Results]) -> None:
    """Write evaluations.json atomically."""
    write_json(folder / RECORD, {name: asdict(results) for name, results in record.items()})


def read_metrics(folder: Path) -> dict[str, float]:
    """The metrics in `folder`; none if there is no metrics.json."""
    path = folder / METRICS
    return read_json(path) if path.exists() else {}


def read_metrics_of(folder: Path, weights: Mapping[str, str]) -> tuple[dict[str, float], dict[str, Source]]:
    """The metrics in `folder` that were computed with these weights, and what each evaluation computed them from.

    Metrics of an earlier version of this project, which wrote no record, count if the embeddings beside them are of
    this encoder.

    Args:
        weights: SHA-256 of the weights of each network, by its name.
    """
    metrics, record = read_metrics(folder), read_record(folder)
    if not (folder / RECORD).exists():
        return (metrics if has_embeddings_of(folder, weights.get("encoder", "")) else {}), {}
    present = {name: results for name, results in record.items() if results.source.weights == dict(weights)}
    names = {name for results in present.values() for name in results.metrics}
    kept = {name: value for name, value in metrics.items() if name in names}
    return kept, {name: results.source for name, results in present.items() if results.metrics}


def has_embeddings_of(folder: Path, encoder: str) -> bool:
    """Whether the stored embeddings of the cohort were computed with the encoder of this hash."""
    try:
        return bool(encoder) and str(read_json(folder / "embeddings.json")["weights"]).startswith(encoder)
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return False


def group_by_source(record: Mapping[str, Results]) -> list[tuple[Source, list[str]]]:
    """Each source with the evaluations that were computed from it, in the order of the record."""
    groups: list[tuple[Source, list[str]]] = []
    for name, results in record.items():
        names = next((names for source, names in groups if source == results.source), None)
        if names is None:
            groups.append((results.source, [name]))
        else:
            names.append(name)
    return groups
