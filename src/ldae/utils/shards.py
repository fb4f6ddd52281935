"""One command divided among N jobs, as in a Slurm array: what each job does, and which of them finishes last.

The jobs do not communicate. Each marks in the output folder that it has finished; the job that finds the marks of all
of them makes the tables.
"""

import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

from ldae.utils.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Every `count`-th item of a list, starting with item `index` (from 0)."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """The shard I of N from "I/N". Arrays that count from 1 to N or from 0 to N - 1 cover all items: 0/N is N/N.

        Raises:
            UserError: the text is something else.
        """
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip(), re.ASCII)
        number, count = map(int, match.groups()) if match else (1, 0)
        if not count or number > count:
            raise UserError(f"--shard {text!r}: give I/N, such as 3/16 for the third of 16 jobs")
        return cls((number - 1) % count, count)

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    def take(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this shard."""
        return items[self.index :: self.count]

    def mark_finished(self, folder: Path, work: str) -> bool:
        """Mark this shard as finished, and return whether all shards of the same work are.

        Args:
            folder: where the marks are kept; they are empty files.
            work: identifies the whole list of items and how they are processed.
        """
        marks = folder / f"{work}-{self.count}"
        # If the folder disappears meanwhile, another job of the same shard was the last one and makes the tables.
        with suppress(FileNotFoundError):
            marks.mkdir(parents=True, exist_ok=True)
            (marks / str(self.index)).touch()
            return sum(1 for _ in marks.iterdir()) == self.count
        return False


def remove_marks(folder: Path) -> None:
    """Remove the marks in `folder`, after the tables have been made."""
    shutil.rmtree(folder, ignore_errors=True)


def shard_override(arguments: Sequence[str]) -> list[str]:
    """The arguments of a script with `--shard I/N` or `--shard=I/N` as the Hydra override `shard=I/N`."""
    found, rest = [], iter(arguments)
    for argument in rest:
        if argument == "--shard":
            found.append(f"shard={next(rest, '')}")
        elif argument.startswith("--shard="):
            found.append(argument.removeprefix("--"))
        else:
            found.append(argument)
    return found
