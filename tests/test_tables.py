"""Proves that the paper's tables show what is stored for the present weights, mark the paper's figures, and name the
command of what is missing; and that the LaTeX is escaped."""

import csv
import io
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from torch.utils.tensorboard import SummaryWriter

from ldae.cli import main as console
from ldae.evaluation.edits.interpolation import LABELS
from ldae.evaluation.tables.layout import PAPER, Cell, Column, Row, Table
from ldae.evaluation.tables.render import escape, to_csv, to_latex, to_latex_document, to_markdown
from ldae.evaluation.tables.sources import Measured, find_training_seconds, read_bench
from ldae.evaluation.tables.write import write_tables
from ldae.runs import Run
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, write_json
from ldae.utils.results_record import Results, Source, write_record

METRICS = {
    "probe/diagnosis/auc": 0.9, "probe/diagnosis/auc_low": 0.85, "probe/diagnosis/auc_high": 0.95,
    "probe/diagnosis/accuracy": 0.8, "probe/age/mae": 5.0, "probe/age/rmse": 6.0,
    "baseline/pca_images/diagnosis/auc": 0.87, "baseline/pca_images/diagnosis/auc_difference": 0.03,
    "baseline/pca_images/age/mae": 5.5,
    "reconstruction/autoencoder/ssim_mask": 0.84, "reconstruction/ddim_15/encoded/ssim_mask": 0.82,
    "interpolation/ldae/real/ssim_gap12": 0.91,
}  # fmt: skip


def weights_of(folder: Path) -> dict[str, str]:
    return dict(Measured.read(folder).weights)


def store(folder: Path, metrics: dict[str, float], weights: dict[str, str], command: str = "") -> None:
    write_json(folder / "evaluation" / "metrics.json", metrics)
    write_record(folder / "evaluation", {"probes": Results(Source(weights), list(metrics), [], [], command)})


@pytest.fixture
def evaluated(run: Path, tmp_path: Path) -> Path:
    """A run that can be changed, with the metrics above."""
    folder = tmp_path / "runs" / "mine"
    shutil.copytree(run, folder)
    store(
        folder, METRICS, weights_of(folder),
        "python evaluate.py data=table data.table=my.csv name=mine evaluation=[probes] evaluation.probes.resamples=9",
    )  # fmt: skip
    return folder


def rows_of(page: str, title: str) -> dict[tuple[str, str], list[str]]:
    """Cells by (label, what the row is of) of the table of this title."""
    part = page.split(f"## {title}")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], row[1]): row[2:] for row in cells}


def test_own_rows_have_intervals_and_the_papers_are_marked(evaluated):
    page = write_tables(evaluated).read_text()
    probes = rows_of(page, "What y predicts: test split")
    assert probes["y", "mine"] == ["0.900 [0.850, 0.950]", "0.800", "–", "5.00", "6.00", "–"]
    assert probes["PCA of scans", "mine"] == ["0.870", "–", "0.030", "5.50", "–", "–"]
    assert probes["*LDAE*", f"*{PAPER}*"] == ["*0.895*", "*0.837*", "*–*", "*4.16*", "*5.23*", "*–*"]
    reconstruction = rows_of(page, "Reconstruction by number of steps")
    assert reconstruction["SSIM in the brain; encoded z_T and y; DDIM", "mine"] == [
        "–", "0.820", "–", "–", "–", "0.840",
    ]  # fmt: skip
    assert reconstruction["*SSIM; encoded z_T and y; DDIM*", f"*{PAPER}*"][0] == "*0.953*"
    interpolation = rows_of(page, "Interpolation through time, by months between the visits")
    label = f"SSIM; {LABELS['ldae']}"
    assert interpolation[label, "mine"] == ["–", "0.910", "–", "–"]
    assert interpolation["*SSIM; LDAE*", f"*{PAPER}*"] == ["*0.969*", "*–*", "*> 0.930*", "*–*"]


def test_what_is_missing_comes_with_the_command_that_measures_it(evaluated):
    page = write_tables(evaluated).read_text()
    missing = rows_of(page, "Unconditional generation")["samples of the U-Net alone, and 3 more rows", "mine"][0]
    evaluate = "python evaluate.py data=table data.table=my.csv name=mine"
    assert missing == f"not measured: `{evaluate} 'evaluation=[generation]'`"
    assert rows_of(page, "Speed")["bench: compress a scan, and 7 more rows", "bench"][0] == "not measured: `make bench`"
    probes = rows_of(page, "What y predicts: test split")
    assert probes["supervised, same encoder", "mine"][0] == (
        "not measured: `python train.py stage=supervised task=diagnosis data=table data.table=my.csv name=mine`, then "
        f"`{evaluate} 'evaluation=[probes]'`"
    )
    assert probes["y, the same in voxel space", "voxels"][0] == "not measured: `make voxel-twin`"
    record = evaluated / "evaluation" / "evaluations.json"
    write_json(record, {"probes": {**read_json(record)["probes"], "command": "ldae cohort x --name mine"}})
    assert "python evaluate.py name=mine 'evaluation=[generation]'" in write_tables(evaluated).read_text()


def test_metrics_of_other_weights_are_in_no_table(evaluated):
    store(evaluated, METRICS, {**weights_of(evaluated), "encoder": "0" * 64})
    with pytest.raises(UserError, match=r"no metrics of its present weights: run `python evaluate\.py name=mine"):
        write_tables(evaluated)
    assert not (evaluated / "evaluation" / "tables").exists()


def test_runs_beside_it_are_shown_if_they_have_the_same_split(evaluated):
    for name, split, auc in (("twin", "0", 0.7), ("other", "1", 0.6)):
        folder = evaluated.parent / name
        shutil.copytree(evaluated, folder)
        metadata = folder / "repr" / "weights" / "metadata.json"
        write_json(metadata, {**read_json(metadata), "split_hash": split})
        store(folder, {"probe/diagnosis/auc": auc}, weights_of(folder))
    config = evaluated.parent / "twin" / "repr" / "config.yaml"
    config.write_text(
        re.sub(r"ldae\.models\.autoencoder\.\w+", "ldae.models.autoencoder.IdentityAutoencoder", config.read_text())
    )
    probes = rows_of(write_tables(evaluated).read_text(), "What y predicts: test split")
    assert probes["y, the same in voxel space", "twin"][0] == "0.700"
    assert not [name for _, name in probes if name == "other"]


def test_tables_of_an_earlier_call_that_are_no_longer_made_are_removed(evaluated):
    store(evaluated, {**METRICS, "external/probe/age/mae": 7.0}, weights_of(evaluated))
    out = write_tables(evaluated).parent
    assert (out / "probes_external.tex").exists()
    store(evaluated, METRICS, weights_of(evaluated))
    write_tables(evaluated)
    assert not (out / "probes_external.tex").exists()
    assert (out / "probes.csv").exists()


def table(label: str, *cells: Cell | None, command: str = "") -> Table:
    rows = [Row(label, cells, "my_run", command), Row("LDAE", [Cell(0.25)] * len(cells), PAPER)]
    return Table("a_b", "50 % & more", [Column(f"x_{i}") for i in range(len(cells))], rows, ("a < b",))


def test_the_csv_has_the_unrounded_numbers():
    lines = list(csv.DictReader(io.StringIO(to_csv(table("a, b", Cell(1 / 3, 0.1, 0.5), None)))))
    assert [line["row"] for line in lines] == ["a, b", "LDAE", "LDAE"]
    assert float(lines[0]["value"]) == 1 / 3
    assert (lines[0]["low"], lines[0]["high"], lines[1]["low"]) == ("0.1", "0.5", "")
    missing = list(csv.DictReader(io.StringIO(to_csv(table("x", None, command="make bench")))))
    assert (missing[0]["value"], missing[0]["command"]) == ("", "make bench")


SPECIAL = r"a_b & 100 % $5 #1 {x} ~ ^ \ <y> | [z] 'q' – é"


def test_latex_has_no_character_that_is_not_escaped():
    """Outside of the tabular's own &, \\ and braces, every special character follows a backslash or is a command."""
    assert escape("a_b & 5 %") == r"a\_b \& 5 \%"
    text = escape(SPECIAL)
    assert not re.search(r"(?<!\\)[_&%$#~^<>|\"']", text)
    assert not re.search(r"(?<!\\)[{}]", re.sub(r"\\text\w+\{\}|\{[][]\}", "", text))
    lines = to_latex(table(SPECIAL, Cell(-0.5, -1, 0), None), "from\nhere").splitlines()
    assert lines[0] == "% from here"
    body = [line for line in lines if line.endswith(r" \\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {3}
    assert r"$-0.500\;[-1.000,\,0.000]$" in body[1]
    assert all(line.count("{") - line.count(r"\{") == line.count("}") - line.count(r"\}") for line in body)
    missing = to_latex(table("x", None, None, command="python evaluate.py 'evaluation=[a_b]'"), "")
    assert r"\multicolumn{2}{p{0.6\linewidth}}{\raggedright not measured: \texttt{python evaluate.py" in missing
    assert r"{[}a\_b{]}" in missing


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX")
def test_the_latex_compiles(tmp_path):
    one = table(SPECIAL, Cell(-0.5, -1, 0), None)
    (tmp_path / "a_b.tex").write_text(to_latex(one, "x"))
    (tmp_path / "tables.tex").write_text(to_latex_document([one], "x"))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60, capture_output=True)


def test_numbers_are_rounded_without_a_negative_zero():
    assert Cell(-0.001, -0.004, 0.004).format(2) == "0.00 [0.00, 0.00]"
    assert Cell(0.93, at_least=True).format(2) == "> 0.93"


def test_a_pipe_does_not_end_a_cell_in_markdown():
    line = next(line for line in to_markdown([table("a|b", Cell(1))], "x", "y").splitlines() if "my_run" in line)
    assert line == r"| a\|b | my_run | 1.000 |"


def test_seconds_of_training_leave_out_the_time_between_two_starts(tmp_path):
    for number, seconds in enumerate((100, 30)):
        writer = SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=str(number))
        writer.add_scalar("loss", 1.0, 1, walltime=time.time() + seconds)
        writer.close()
    assert find_training_seconds(Run(tmp_path)) == pytest.approx(130, abs=2)
    assert find_training_seconds(Run(tmp_path / "none")) is None


def test_a_damaged_bench_is_refused_and_no_run_is_one_line(tmp_path):
    assert read_bench(tmp_path) == {}
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        read_bench(tmp_path)
    result = CliRunner().invoke(console, ["tables", "nobody", "--runs", str(tmp_path)])
    assert result.exit_code == 2
    assert f"there is no run {tmp_path / 'nobody'}" in result.output
