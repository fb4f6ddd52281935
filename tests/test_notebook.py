"""Proves that the tutorial runs from top to bottom on the smoke run, and is committed without outputs."""

import json
import os
import subprocess
import sys

from conftest import ROOT

NOTEBOOK = ROOT / "notebooks" / "tutorial.ipynb"


def cells(kind):
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_the_tutorial_runs_from_top_to_bottom(smoke):
    """Its code cells, in order, in one fresh interpreter, as a kernel would run them."""
    code = "\n\n".join("".join(cell["source"]) for cell in cells("code"))
    environment = os.environ | {"LDAE_RUN": "smoke", "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    options = {"cwd": smoke, "env": environment, "capture_output": True, "text": True, "timeout": 600}
    result = subprocess.run(command, **options, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    for said in ("probes ['age', 'diagnosis']", "as it is ['AD"):
        assert said in result.stdout


def test_the_tutorial_holds_no_output():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))
    assert NOTEBOOK.stat().st_size < 1_000_000
