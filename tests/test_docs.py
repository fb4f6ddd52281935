"""Proves that the pages name what exists: links, sections, files, functions, config overrides, commands and options.

Of docs/history and CHANGELOG.md, which also name what no longer exists, only the links are checked.
"""

import ast
import importlib
import importlib.util
import re
import shlex
from functools import cache
from pathlib import Path

import click
import pytest
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from ldae.bench.__main__ import hydra_arguments
from ldae.bench.gpu_check.__main__ import build_parser
from ldae.bench.gpu_check.run import choose_items
from ldae.cli import main as console
from ldae.config import check_constructor_arguments, compose_config
from ldae.pipeline import LDAE
from ldae.scans.scan import Scan
from ldae.utils.errors import UserError
from ldae.utils.renamed import ARGUMENTS, CLASSES, MODULES
from pages import LINKED, PAGES, ROOT, STAGE_OF, code_spans, commands, fenced_blocks

SCRIPTS = ("train", "encode_latents", "evaluate")
OVERRIDE = re.compile(r"""[+~]*[a-z][\w/.]*(@[\w.]+)?=[^\s"]+""")
# Configs in which an override of the pages may be meant, tried in this order.
CONTEXTS = (
    ("train", "stage=repr"),
    ("train", "stage=aekl", "model=published"),
    ("train", "stage=aekl", "experiment=paper", "data.table=x", "perceptual=lpips"),
    ("train", "stage=aekl", "data=table", "data.table=x", "perceptual=medicalnet"),
    ("train", "stage=repr", "experiment=ixi"),
    ("train", "stage=prior"),
    ("bench",),
    ("bench", "bench=full"),
    ("preprocess",),
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def on_every(pages):
    return pytest.mark.parametrize("page", pages, ids=name_of)


@on_every(LINKED)
def test_every_link_leads_to_a_file_and_a_section_of_it(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, section = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if section:
            assert section in sections(file), target


@cache
def sections(page: Path) -> set[str]:
    """The names by which links find the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@on_every(PAGES)
def test_every_file_of_the_repository_that_a_page_names_exists(page):
    places = ("src/", "conf/", "tests/", "docs/", "notebooks/", ".ci/")
    named = [span for span in code_spans(page) if span.startswith(places) and re.fullmatch(r"[\w./-]+", span)]
    missing = [span for span in named if not (ROOT / span).exists()]
    assert not missing


def test_every_folder_and_file_of_the_readmes_map_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Map\n\n```\n(.*?)```", text, flags=re.DOTALL)[1]
    # The words before the first double space of a line are paths; the last line has them side by side.
    paths = [word for line in block.splitlines() for word in re.split(r"  +", line)[0].split()]
    paths += block.splitlines()[-1].split()
    assert len(paths) > 15
    assert not [path for path in paths if not (ROOT / path).exists()]
    packages = {path.parent.name for path in ROOT.glob("src/ldae/*/__init__.py")} - {"utils"}
    assert packages <= {Path(path).name for path in paths}, "every package is on the map"


@on_every(PAGES)
def test_every_function_and_class_that_a_page_names_exists(page):
    named = [span for span in code_spans(page) if re.fullmatch(r"ldae(\.\w+)+", span)]
    assert not [name for name in named if not exists(name)]


def exists(name: str) -> bool:
    """Whether `name` is a module, or a chain of attributes of one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            value = getattr(value, part, None)
        return value is not None
    return False


@on_every(PAGES)
def test_every_override_that_a_page_names_composes(page):
    refused = []
    for span in code_spans(page):
        words = span.split()
        if all(OVERRIDE.fullmatch(word) for word in words) and "..." not in span:
            refused += [span for problem in [why_refused(words)] if problem]
    assert not refused


def why_refused(overrides: list[str]) -> str | None:
    """The reason why no config takes these overrides; None if one does."""
    overrides = [word for word in overrides if "NEWNAME" not in word and not word.startswith("hydra")]
    chosen = {word.split(".")[1].partition("=")[0] for word in overrides if word.startswith("evaluation.")}
    groups = [f"evaluation=[{','.join(sorted(chosen))}]"] if chosen else []
    reason = None
    for primary, *context in CONTEXTS:
        reason = composes(primary, (*context, *groups, *overrides))
        if reason is None:
            return None
    return reason


@cache
def composes(primary: str, overrides: tuple[str, ...]) -> str | None:
    """None if this config composes and its classes take their arguments, otherwise the error."""
    try:
        check_constructor_arguments(compose_config(primary, overrides))
    except (HydraException, OmegaConfBaseException, UserError, ValueError) as error:
        return f"{primary} {' '.join(overrides)}: {error}"
    return None


@on_every(PAGES)
def test_every_command_of_a_page_has_known_options_and_overrides(page):
    problems = {" ".join(words): problem for words in commands(page) if (problem := problem_of(words))}
    assert not problems


def problem_of(words: list[str]) -> str | None:
    """What is wrong with a command; None if nothing is."""
    program, rest = words[0], words[1:]
    if program == "ldae":
        return console_problem(rest)
    if program == "make":
        return make_problem(rest)
    script = next((word for word in words if word.endswith(".py")), None)
    if script is not None:
        return script_problem(Path(script).stem, words[words.index(script) + 1 :])
    if rest[:1] == ["-m"]:
        return module_problem(rest[1], rest[2:])
    return None


def console_problem(words: list[str]) -> str | None:
    """Options of the console script are parsed, files are not opened. Without a known command, as in `ldae ... --x`."""
    if not words or words[0] not in console.list_commands(click.Context(console)):
        known = {option for c in ("embed", "manipulate") for option in options_of(c)}
        return next((f"no option {word}" for word in words if word.startswith("--") and word not in known), None)
    command = console.get_command(click.Context(console), words[0])
    try:
        command.make_parser(click.Context(command)).parse_args(words[1:])
    except click.UsageError as error:
        return str(error)
    return None


def options_of(name: str) -> list[str]:
    """All options of a console command."""
    command = console.get_command(click.Context(console), name)
    return [text for parameter in command.params for text in (*parameter.opts, *parameter.secondary_opts)]


def make_problem(words: list[str]) -> str | None:
    """The target exists, and what ARGS gives to it is known."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    values = dict(word.split("=", 1) for word in words if "=" in word)
    target = next(word for word in words if "=" not in word)
    if target not in targets:
        return f"no target {target}"
    given = shlex.split(values.get("ARGS", ""))
    if target in STAGE_OF:
        return script_problem("train", [f"stage={STAGE_OF[target]}", *given])
    if target in ("encode", "evaluate"):
        return script_problem({"encode": "encode_latents"}.get(target, target), given)
    if target in ("bench", "gpu-check"):
        return module_problem("ldae.bench" if target == "bench" else "ldae.bench.gpu_check", given)
    return None


def module_problem(name: str, words: list[str]) -> str | None:
    """A module that runs as a program, and its arguments."""
    if name == "ldae.bench.gpu_check":
        given = build_parser().parse_args(words)
        choose_items(given.parts.split(","))
        return None
    if name == "ldae.bench":
        overrides = [word for word in hydra_arguments(words) if not word.startswith("bench.against=")]
        return composes("bench", tuple(overrides))
    return None if importlib.util.find_spec(name) else f"no module {name}"


def script_problem(name: str, words: list[str]) -> str | None:
    """The overrides of one of the three scripts compose; of a sweep, the first of the values."""
    if name not in SCRIPTS:
        return None if (ROOT / f"{name}.py").exists() else f"no script {name}.py"
    sweep = "-m" in words
    overrides = [word for word in words if "=" in word and not word.startswith(("hydra", "$", "-"))]
    overrides = [word for word in overrides if "NEWNAME" not in word]
    if sweep:
        overrides = [word.split(",")[0] for word in overrides]
    keys = {word.split("=")[0] for word in overrides}
    if name == "train" and "stage" not in keys:
        overrides.insert(0, "stage=repr")
    if "data=table" in overrides or "experiment=paper" in overrides:
        overrides += [] if "data.table" in keys else ["data.table=x"]
    return composes(name, tuple(overrides))


@on_every(PAGES)
def test_the_python_examples_of_a_page_import_and_call_what_exists(page):
    blocks = fenced_blocks(page, "python")
    methods = {"model": LDAE, "scan": Scan}
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            assert all(exists(f"{node.module}.{alias.name}") for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in methods:
            kind = methods[node.value.id]
            assert hasattr(kind, node.attr) or node.attr in kind.__dataclass_fields__, ast.unparse(node)


def test_every_page_that_sources_and_configs_name_exists():
    files = [*ROOT.glob("src/**/*.py"), *ROOT.glob("conf/**/*.yaml"), *ROOT.glob("*.py"), ROOT / "Makefile"]
    named = {(name_of(file), page) for file in files for page in re.findall(r"docs/[\w/-]+\.\w+", file.read_text())}
    assert named
    assert not {(file, page) for file, page in named if not (ROOT / page).exists()}


def test_every_renamed_class_and_setting_is_in_the_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    moved = {present: former for former, present in MODULES.items()}
    for former, present in CLASSES.items():
        module, _, name = former.rpartition(".")
        assert f"| `{moved.get(module, module)}.{name}` | `{present}` |" in text
    for former, present in MODULES.items():
        assert f"| `{former}` | `{present}` |" in text
    for arguments in ARGUMENTS.values():
        for former, present in arguments.items():
            assert re.search(rf"\.{former}` \| `[\w.]+\.{present}` \|", text), f"{former} -> {present}"
