"""Proves the direction of imports, that `--help` is quick, and that nothing needs torchvision."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "ldae"
# A package or root module imports only from floors below its own. Those on one floor do not know each other.
FLOORS = (
    {"utils"},
    {"data", "diffusion", "models"},
    {"config", "denoiser", "losses", "preprocessing", "prior", "runs"},
    {"editing", "scans", "training"},
    {"bundle"},
    {"pipeline"},
    {"evaluation"},
    {"stages"},
    {"experiment"},
    {"bench", "commands"},
    {"cli"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
ROOT = {"__init__", "cli", "config", "denoiser", "experiment", "pipeline", "runs"}


def imported(path: Path):
    """Names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from ([f"ldae.{alias.name}" for alias in node.names] if node.module == "ldae" else [node.module])


def part(path: Path) -> str:
    """The package, or the root module, that a file of src/ldae belongs to."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def test_the_root_holds_seven_modules_and_every_package_has_a_floor():
    assert {path.stem for path in SOURCE.glob("*.py")} == ROOT
    packages = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert packages | ROOT == set(FLOOR) | {"__init__"}


@pytest.mark.parametrize("name", sorted(FLOOR))
def test_nothing_imports_upwards(name):
    files = [path for path in SOURCE.rglob("*.py") if part(path) == name]
    assert files
    upwards = {
        f"{path.relative_to(SOURCE)} imports {target}"
        for path in files
        for target in imported(path)
        if target.startswith("ldae.") and (other := target.split(".")[1]) != name and FLOOR[other] >= FLOOR[name]
    }
    assert not upwards


def test_the_package_itself_knows_only_the_pipeline():
    assert set(imported(SOURCE / "__init__.py")) - {"typing"} == {"ldae.pipeline"}


def test_nothing_needs_torchvision():
    users = [p.name for p in SOURCE.rglob("*.py") if any(n.split(".")[0] == "torchvision" for n in imported(p))]
    assert not users


def test_help_waits_for_no_slow_import():
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom ldae.cli import main\n"
        "result = CliRunner().invoke(main, ['--help'])\nassert result.exit_code == 0\n"
        "slow = {'torch', 'monai', 'nilearn', 'sklearn', 'pandas', 'matplotlib'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
