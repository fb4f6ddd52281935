"""Proves that the evaluation of forecasts finds a change that is there, on a linear model in which all is known."""

import numpy as np
import pandas as pd
import pytest
from hydra.utils import instantiate

from ldae.config import check_constructor_arguments, compose_config
from ldae.editing.editor import Editor
from ldae.editing.forecast_file import read_forecaster
from ldae.evaluation.edits.edited_scans import add_change
from ldae.evaluation.edits.forecast import Forecast
from ldae.evaluation.edits.forecast_results import round_gap
from test_evaluation_editing import LinearModelOfBrains, context  # noqa: F401 (a fixture)


def test_the_forecast_beats_the_last_visit_where_the_ventricles_grow(context):  # noqa: F811
    metrics = dict(Forecast(Editor(depth=1.0), ["age"], draws=3, maps=2, pictures=1, resamples=50)(context))
    assert metrics["forecast/training_subjects"] == 20
    assert metrics["forecast/pairs"] == 3 * metrics["forecast/subjects"] == 18
    rows = pd.read_csv(context.out / "forecast.csv").query("against == 'real'")
    last = rows.query("method == 'last'").iloc[0]
    x = context.volumes([int(last["row"]), int(last["target"])]).numpy()
    assert last["mse"] == pytest.approx(((x[0] - x[1]) ** 2).mean(), rel=1e-4)
    assert metrics["forecast/gain/real/ventricle_error_over_last_gap24"] > 0
    assert metrics["forecast/verdict/real/ventricle_error_gap24"] == 1
    assert (context.out / "forecast_1.png").exists()
    assert (context.out / "forecast_ventricle_error.png").exists()
    one = read_forecaster(context.out / "forecast.safetensors", context.weights)
    y = np.zeros((1, 6))
    assert one.change(y, pd.DataFrame({"age": [70.0]}), np.array([2.0]))[0, 0] == pytest.approx(1.0, abs=0.25)


def test_interpolated_visits_know_the_future_and_extrapolated_ones_the_past(context):  # noqa: F811
    dict(Forecast(Editor(), ["age"], draws=2, maps=1, pictures=0, resamples=10)(context))
    rows = pd.read_csv(context.out / "forecast.csv").query("against == 'real'")
    sessions = context.table["months"].to_numpy()
    counts = {name: set(sessions[part["row"]]) for name, part in rows.groupby("method")}
    assert counts["last"] == {0, 6}
    assert counts["extrapolated"] == {6}  # the only earlier visits that have one before them
    interpolated = rows.query("method == 'interpolated'")
    assert set(sessions[interpolated["target"]]) == {6}


def test_without_pairs_of_visits_one_line_says_what_to_do(context):  # noqa: F811
    context.table = context.table[context.table["months"] == 0].reset_index(drop=True)
    context.embeddings = context.embeddings[: len(context.table)]
    assert dict(Forecast(Editor())(context)) == {}
    assert "0 training subjects have two visits, a forecast needs 10: train on a table" in context.skipped[0]
    assert not (context.out / "forecast.safetensors").exists()


def test_months_between_visits_are_rounded():
    assert [round_gap(months / 12) for months in (1, 5, 11, 13, 16, 20, 22, 29, 61)] == [
        6,
        6,
        12,
        12,
        18,
        18,
        24,
        24,
        60,
    ]


def test_a_change_leaves_the_background_and_stays_in_range():
    import torch

    x, change = torch.tensor([0.0, 0.5, 0.9, 0.1]), torch.tensor([0.3, 0.2, 0.3, -0.4])
    assert add_change(x, change).tolist() == pytest.approx([0.0, 0.7, 1.0, 0.0])


def test_the_config_builds_the_evaluation():
    config = compose_config("evaluate", ["evaluation=[forecast]", "experiment=demo"])
    check_constructor_arguments(config.evaluation)
    assert instantiate(config.evaluation.forecast).editor.depth == 1.0
    assert config.data.phantom.longitudinal.seed != config.data.phantom.seed
    short = compose_config("evaluate", ["experiment=demo"]).evaluation
    assert "forecast" not in short
    assert not short.interpolation.longitudinal
