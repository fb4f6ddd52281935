"""Proves that the tutorial runs from top to bottom on the smoke run, and is committed without outputs."""

import json

from faults.forked import ROOT, script

NOTEBOOK = ROOT / "notebooks" / "tutorial.ipynb"


def cells(kind):
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_the_tutorial_runs_from_top_to_bottom(smoke, tmp_path):
    """Its code cells, in order, in one fresh process, as a kernel would run them."""
    code = "\n\n".join("".join(cell["source"]) for cell in cells("code"))
    (tmp_path / "tutorial.py").write_text(code, encoding="utf-8")
    environment = {"LDAE_RUN": "smoke", "MPLBACKEND": "Agg", "CUDA_VISIBLE_DEVICES": ""}
    result = script(tmp_path / "tutorial.py", cwd=smoke, environment=environment)
    for said in ("probes ['age', 'diagnosis']", "as it is ['AD"):
        assert said in result.stdout


def test_the_tutorial_holds_no_output():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))
    assert NOTEBOOK.stat().st_size < 1_000_000
