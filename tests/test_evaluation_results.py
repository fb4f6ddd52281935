"""Tests what a folder of results contains after evaluations of other settings, weights, scans and cohorts."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from ldae.evaluation.context import Context
from ldae.evaluation.other_cohort import find_prefix
from ldae.evaluation.results import start_record
from ldae.evaluation.run import run_in_context
from ldae.utils.errors import UserError
from ldae.utils.results_record import Source, read_metrics_of, read_record

WEIGHTS = {"autoencoder": "a" * 64, "encoder": "e" * 64}
SOURCE = Source(WEIGHTS, "cohort/scans.csv", "r" * 64, "s" * 64, {"train": 6, "test": 2})


def context(out, source=SOURCE, prefix=""):
    table = pd.DataFrame({"subject": ["a", "b"], "split": "test"})
    return Context(
        model=None, table=table, volumes=None, posterior=None, embeddings=np.zeros((2, 3)), untrained=None, out=out,
        spacing=(1.0,) * 3, source=source, prefix=prefix,
    )  # fmt: skip


def writes(metrics, files=(), skipped=()):
    """An evaluation that yields these metrics, writes these files and skips these parts."""

    def evaluate(context):
        for name in files:
            (context.out / name).write_bytes(b"")
        for text in skipped:
            context.skip(text)
        yield from metrics.items()

    return evaluate


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


PROBES = writes({"probe/sex/auc": 0.5, "probe/age/mae": 3.0}, ["sex_roc.png", "age_scatter.png", "sex_predictions.csv"])
GAP = writes({"gap/filled": 1.0}, ["gap.png"])


def test_an_evaluation_replaces_all_metrics_and_files_that_it_wrote_before(tmp_path):
    run_in_context(context(tmp_path), {"probes": PROBES, "gap": GAP}, "x")
    run_in_context(context(tmp_path), {"probes": writes({"probe/age/mae": 4.0}, ["age_scatter.png"])}, "x")
    assert metrics(tmp_path) == {"gap/filled": 1.0, "probe/age/mae": 4.0}
    assert contents(tmp_path) == ["age_scatter.png", "evaluations.json", "gap.png", "metrics.json", "report.html"]
    assert "sex" not in (tmp_path / "report.html").read_text()


def test_a_failed_evaluation_leaves_its_earlier_results_as_they_were(tmp_path):
    def fail(context):
        (context.out / "sex_roc.png").write_bytes(b"new")
        yield "probe/sex/auc", 0.9
        raise UserError("no disk")

    run_in_context(context(tmp_path), {"probes": PROBES}, "x")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="no disk"):
        run_in_context(context(tmp_path), {"probes": fail}, "x")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "other",
    [
        replace(SOURCE, weights={**WEIGHTS, "encoder": "f" * 64}),
        replace(SOURCE, rows="changed"),
        replace(SOURCE, split_hash="changed"),
    ],
)
def test_results_of_other_weights_or_scans_are_moved_away(tmp_path, caplog, other):
    run_in_context(context(tmp_path), {"probes": PROBES}, "x")
    (tmp_path / "notes.csv").write_text("of the user")
    run_in_context(context(tmp_path, other), {"gap": GAP}, "x")
    assert metrics(tmp_path) == {"gap/filled": 1.0}
    present = ["evaluations.json", "gap.png", "metrics.json", "notes.csv", "outdated", "report.html"]
    assert contents(tmp_path) == present
    assert "sex_roc.png" in contents(tmp_path / "outdated")
    assert metrics(tmp_path / "outdated") == {"probe/age/mae": 3.0, "probe/sex/auc": 0.5}
    assert "results of probes are of other weights or scans: moved to" in caplog.text


def test_evaluations_at_the_same_time_keep_the_results_of_each_other(tmp_path):
    def while_another_runs(own):
        run_in_context(context(tmp_path), {"gap": GAP}, "x")
        yield from PROBES(own)

    run_in_context(context(tmp_path), {"probes": while_another_runs}, "x")
    assert metrics(tmp_path) == {"gap/filled": 1.0, "probe/sex/auc": 0.5, "probe/age/mae": 3.0}
    assert set(read_record(tmp_path)) == {"gap", "probes"}
    assert {"gap.png", "sex_roc.png"} <= set(contents(tmp_path))


def test_another_cohort_removes_no_results_of_the_same_weights(tmp_path):
    run_in_context(context(tmp_path), {"probes": PROBES}, "x")
    for number, prefix in enumerate(("external/", "external/B/")):
        source = replace(SOURCE, table=f"{number}/scans.csv", rows=str(number))
        evaluate = writes({f"{prefix}probe/age/mae": 5.0 + number}, [f"{prefix.replace('/', '_')}age_scatter.png"])
        run_in_context(context(tmp_path, source, prefix), {"external": evaluate}, "x")
    expected = {"probe/sex/auc": 0.5, "probe/age/mae": 3.0, "external/probe/age/mae": 5.0}
    assert metrics(tmp_path) == {**expected, "external/B/probe/age/mae": 6.0}
    assert {"external_age_scatter.png", "external_B_age_scatter.png", "age_scatter.png"} <= set(contents(tmp_path))
    assert set(read_record(tmp_path)) == {"probes", "external", "external/B"}


def test_the_report_says_what_was_computed_from_what_and_what_was_skipped(tmp_path):
    evaluate = writes({"gap/filled": 1.0}, skipped=["probe sex is skipped: <no column>"])
    run_in_context(context(tmp_path), {"gap": evaluate}, "x")
    text = (tmp_path / "report.html").read_text()
    for said in ("scans.csv, 8 scans (6 train, 2 test)", "encoder eeeeeeeeeeee", "split ssssssssssss"):
        assert said in text
    assert "probe sex is skipped: &lt;no column&gt;" in text


def test_metrics_of_other_weights_are_not_read(tmp_path):
    """The model card contains the numbers of the weights that it describes."""
    run_in_context(context(tmp_path), {"probes": PROBES}, "x")
    found, sources = read_metrics_of(tmp_path, WEIGHTS)
    assert found == {"probe/sex/auc": 0.5, "probe/age/mae": 3.0}
    assert sources == {"probes": SOURCE}
    assert read_metrics_of(tmp_path, {**WEIGHTS, "encoder": "f" * 64}) == ({}, {})


@pytest.mark.parametrize(("encoder", "kept"), [("e" * 64, True), ("f" * 64, False)])
def test_metrics_without_a_record_are_kept_if_the_embeddings_are_of_the_encoder(tmp_path, encoder, kept):
    (tmp_path / "metrics.json").write_text(
        '{"probe/sex/auc": 0.5, "cv/inductive/x": 1, "gap/unfilled": 2, "gap/filled": 3}'
    )
    (tmp_path / "embeddings.json").write_text(json.dumps({"weights": encoder, "rows": "r"}))
    assert bool(read_metrics_of(tmp_path, WEIGHTS)[0]) == kept
    start_record(tmp_path, WEIGHTS["encoder"])
    (tmp_path / "embeddings.json").write_text(json.dumps({"weights": WEIGHTS["encoder"], "rows": "r"}))  # made anew
    run_in_context(context(tmp_path), {"gap": GAP}, "x")
    earlier = {"probe/sex/auc": 0.5, "cv/inductive/x": 1} if kept else {}
    assert metrics(tmp_path) == {"gap/filled": 1.0, **earlier}


def prefix(folder, table, name=None):
    config = OmegaConf.create({"data": {"table": str(table)}, "evaluation": {"external": {"name": name}}})
    return find_prefix({"external": None}, SimpleNamespace(evaluation=folder), config)


def test_a_second_cohort_without_a_name_is_named_after_its_folder(tmp_path, caplog):
    def evaluate(table):
        found = prefix(tmp_path, table)
        source = replace(SOURCE, table=str(table), rows=str(table))
        run_in_context(context(tmp_path, source, found), {"external": writes({f"{found}probe/age/mae": 1.0})}, "x")
        return found

    tables = [tmp_path / name / "scans.csv" for name in ("A", "B", "x/B", "probe")]
    expected = ["external/", "external/B/", "external/B_2/", "external/probe_2/"]
    assert [evaluate(table) for table in tables] == expected
    assert "evaluation.external.name" in caplog.text
    assert [prefix(tmp_path, table) for table in tables] == expected, "the same table keeps its name"
    assert set(metrics(tmp_path)) == {f"{name}probe/age/mae" for name in expected}


def test_a_cohort_may_be_named(tmp_path):
    assert prefix(tmp_path, "A/scans.csv", "site_1.5T") == "external/site_1.5T/"
    for name in ("a/b", "..", "probe", ""):
        with pytest.raises(UserError, match=r"evaluation\.external\.name"):
            prefix(tmp_path, "A/scans.csv", name)
