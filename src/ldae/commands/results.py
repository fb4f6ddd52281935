"""Files that a command makes of scans: none replaces a file that was made of other scans.

Beside each is a JSON file of the same name with the SHA-256 of the scans, as two scans in two folders often have one
name, such as T1w.nii.gz. It may also say how the file was made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256, read_json, write_json

SOURCES = "SourceSHA256"


@dataclass(frozen=True)
class Results:
    """Files that are made of the same scans.

    Attributes:
        sources: SHA-256 of each scan.
    """

    sources: tuple[str, ...]

    @classmethod
    def of(cls, scans: Sequence[Path], files: Sequence[Path]) -> "Results":
        """The results of `scans` that will be written to `files`; to be called before anything is computed.

        Raises:
            UserError: one of `files` exists and is not known to be made of `scans`.
        """
        results = cls(tuple(file_sha256(scan) for scan in scans if scan.is_file()))
        for file in files:
            record = _record(file)
            if (file.exists() or record.exists()) and results.sources != _read_sources(record):
                made = "was made of another scan" if _read_sources(record) else "was not made by this command"
                present = file if file.exists() else record
                raise UserError(f"-o: {present} exists and {made}: choose another -o, or remove the file")
        return results

    def write(
        self, file: Path, write: Callable[[Path], None], made: Mapping[str, str | float | None] | None = None
    ) -> None:
        """Write one file by `write`, which takes its path; first the record of the scans, and of how it is made."""
        write_json(_record(file), {SOURCES: list(self.sources), **(made or {})})
        write(file)


def _record(file: Path) -> Path:
    name = file.name.removesuffix(".gz")
    return file.with_name(name.removesuffix(".nii").removesuffix(".html") + ".json")


def _read_sources(record: Path) -> tuple[str, ...] | None:
    try:
        return tuple(read_json(record)[SOURCES])
    except (OSError, ValueError, KeyError, TypeError):
        return None
