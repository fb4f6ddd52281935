"""The pages of the project, and the commands and code that they name."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINKED = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
# Without docs/history and CHANGELOG.md, which also name what no longer exists.
PAGES = [page for page in LINKED if page.name != "CHANGELOG.md" and page.parent.name != "history"]
PROGRAMS = re.compile(r"(python|ldae|make|accelerate launch|torchrun|sbatch|evaluate\.py|[A-Z]=)(?=\s|$)")
# By target of the Makefile.
STAGE_OF = {f"train-{stage}": stage for stage in ("aekl", "pretrain", "repr", "prior", "supervised")}


def code_spans(page: Path) -> list[str]:
    """What is between single backticks, line breaks as spaces, without the fenced blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(span.split()).replace(r"\|", "|") for span in re.findall(r"`([^`]+)`", text)]


def fenced_blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a language; without one by default."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in blocks if name == language]


def fenced_lines(page: Path) -> list[str]:
    """The lines of fenced blocks without a language, with the page's shell variables filled in."""
    lines, values = [], {}
    for line in "".join(fenced_blocks(page)).splitlines():
        line = re.sub(r"\$(\w+)", lambda match: values.get(match[1], match[0]), line)
        assigned = re.fullmatch(r'([A-Z])="?([^"]*)"?', line)
        if assigned:
            values[assigned[1]] = assigned[2]
        lines += [part.strip() for part in line.split("; ")]
    return lines


def commands(page: Path) -> list[list[str]]:
    """The commands of a page, split into words; in prose those between backticks."""
    found = []
    for text in [*code_spans(page), *fenced_lines(page)]:
        text = re.sub(r"\s{2,}#.*", "", text)
        if PROGRAMS.match(text):
            found.append([word for word in shlex.split(text) if word != "..."])
    return found
