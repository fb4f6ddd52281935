"""Proves the direction of imports, that `--help` is quick, and that nothing needs torchvision."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "ldae"
# A part of the package -> the parts it may not know.
FORBIDDEN = {
    "diffusion": {"models", "data", "losses", "training", "evaluation", "stages", "pipeline", "experiment", "cli"},
    "models": {"diffusion", "data", "losses", "training", "evaluation", "stages", "pipeline", "experiment", "cli"},
    "data": {"diffusion", "models", "losses", "training", "evaluation", "stages", "pipeline", "experiment", "cli"},
    "preprocessing": {
        "diffusion", "models", "losses", "training", "evaluation", "stages", "pipeline", "experiment", "cli", "config",
    },
    "losses": {"data", "training", "evaluation", "stages", "pipeline", "experiment", "cli"},
    "training": {"evaluation", "stages", "pipeline", "experiment", "cli", "models.unet"},
    "evaluation": {"training", "stages", "pipeline", "experiment", "cli"},
    "stages": {"pipeline", "experiment", "cli"},
    "pipeline": {"stages", "training", "experiment", "cli"},
}  # fmt: skip


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


@pytest.mark.parametrize("part", FORBIDDEN)
def test_imports_run_one_way(part):
    files = sorted((SOURCE / part).rglob("*.py")) or [SOURCE / f"{part}.py"]
    assert files[0].exists()
    for path in files:
        for name in imported(path):
            for other in FORBIDDEN[part]:
                target = f"ldae.{other}"
                assert name != target, f"{path.relative_to(SOURCE)} imports {name}"
                assert not name.startswith(f"{target}."), f"{path.relative_to(SOURCE)} imports {name}"


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
