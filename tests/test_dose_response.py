"""Tests how structures follow an edit: on volumes and images whose change is known, with right signs from the truth.

A direction that moves a structure is told from one that cannot, slopes are in the stated units, and the growth of a
structure between two images becomes a volume.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ldae.editing.direction import Direction
from ldae.editing.directions import Pattern
from ldae.editing.editor import Editor
from ldae.editing.units import Calibration, PublishedStep, TrainingDistance
from ldae.evaluation.context import Context
from ldae.evaluation.edits.anatomy import Anatomy
from ldae.evaluation.edits.counterfactuals import expected_factor
from ldae.evaluation.edits.dose_response import (
    RightSlope,
    measure_cohort_slopes,
    moves,
    right_slopes,
    summarise_dose_response,
    weighted_slope,
)
from ldae.evaluation.edits.manipulation import Manipulation
from ldae.evaluation.probes.bootstrap import draw_subject_weights
from ldae.evaluation.probes.targets import Classification, Regression
from small_images import soft_ball

ALPHAS = [-1.0, -0.5, 0.0, 0.5, 1.0]
SUBJECTS = [f"s{number}" for number in range(20)]
WEIGHTS = draw_subject_weights(SUBJECTS, 100, 0)


def direction(calibration, unit=None):
    scale = (unit or TrainingDistance()).scale(calibration, 4)
    return Direction(np.zeros(4), np.ones(4), np.eye(4)[0], scale, calibration)


AGE = direction(Calibration("age", 0.05, deviation=8.0))
DISEASE = direction(Calibration("diagnosis", 2.0, ("CN", "AD")))


def volumes(slope, start=5000.0, spread=10.0):
    """(20, 5): a volume that changes by `slope` per unit of alpha, give or take."""
    own = slope + spread * np.random.default_rng(0).standard_normal(20)
    return start + np.outer(own, ALPHAS)


def summarise(measured, right, along=AGE, name="hippocampus"):
    return dict(summarise_dose_response("m", ALPHAS, {name: measured}, WEIGHTS, {name: right}, along))


def test_a_structure_that_follows_alpha_has_its_slope_in_mm3_percent_and_years():
    found = summarise(volumes(-80), RightSlope())
    assert found["m/hippocampus_slope"] == pytest.approx(-80, abs=8)
    assert found["m/hippocampus_slope_low"] < found["m/hippocampus_slope"] < found["m/hippocampus_slope_high"]
    assert found["m/hippocampus_slope_percent"] == pytest.approx(-1.6, abs=0.2)
    # alpha = 1 is 8 years.
    assert found["m/hippocampus_slope_per_10_years"] == pytest.approx(found["m/hippocampus_slope"] * 10 / 8)
    assert found["m/hippocampus_spearman_share"] == found["m/hippocampus_right"] == found["m/hippocampus_moves"] == 1
    assert "m/hippocampus_slope_per_10_years" not in summarise(volumes(-80), RightSlope(), DISEASE)


def test_a_direction_that_cannot_move_a_structure_says_so():
    still = np.full((20, 5), 5000.0)
    found = summarise(still, RightSlope())
    assert found["m/hippocampus_moves"] == found["m/hippocampus_right"] == found["m/hippocampus_spearman_share"] == 0
    noisy = summarise(volumes(0, spread=50), RightSlope())
    assert noisy["m/hippocampus_moves"] == 0
    wrong = summarise(volumes(80), RightSlope())
    assert wrong["m/hippocampus_moves"] == wrong["m/hippocampus_right"] == 0
    # In the right direction, but a twentieth of what is right.
    right = RightSlope(true=np.full(20, -1600.0))
    slight = summarise(volumes(-80, spread=5), right)
    assert (slight["m/hippocampus_right"], slight["m/hippocampus_moves"]) == (1, 0)
    assert slight["m/hippocampus_slope_ratio"] == pytest.approx(0.05, abs=0.005)


def test_the_right_sign_is_that_of_counterfactuals_then_of_the_cohort_then_of_ageing():
    up, down, unclear = np.full(5, 3.0), np.full(5, -3.0), np.array([1.0, -5.0, 5.0, -5.0, 5.0])
    assert RightSlope(true=up, cohort=down).sign("hippocampus") == 1
    assert RightSlope(cohort=up).sign("hippocampus") == 1
    assert RightSlope(cohort=unclear).sign("hippocampus") == -1
    assert RightSlope().sign("inferior_lateral_ventricle") == 1
    assert RightSlope(true=np.zeros(5)).sign("amygdala") == -1


def test_slopes_are_compared_with_what_the_same_measurement_sees_of_the_truth():
    metrics = {"true_hippocampus": np.full(20, -100.0), "seen_hippocampus": np.full(20, -50.0)}
    right = right_slopes(metrics, 0.9, {}, ["hippocampus"])["hippocampus"]
    found = summarise(volumes(-90, spread=1), right, DISEASE)
    assert found["m/hippocampus_slope_true"] == pytest.approx(-90)
    assert found["m/hippocampus_slope_seen"] == pytest.approx(-45)
    assert found["m/hippocampus_slope_ratio"] == pytest.approx(2, rel=0.05)
    assert right_slopes(metrics, None, {}, ["hippocampus"])["hippocampus"].true is None
    assert moves(np.full(20, -90.0), WEIGHTS, right, "hippocampus")


def test_weighted_slopes_by_hand():
    x, y = np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0, 5.0])
    weights = np.array([[1.0, 1, 1], [0, 2, 1], [0, 3, 0]])
    np.testing.assert_allclose(weighted_slope(x, y, weights), [2, 2, np.nan])


@pytest.fixture
def context(tmp_path):
    """40 subjects, all in train: hippocampi lose 20 mm3 a year; AD is 12 years older and 0.9 more severe."""
    rng = np.random.default_rng(0)
    ill = np.arange(40) % 2
    age = 60 + 12 * ill + rng.normal(0, 5, 40)
    table = pd.DataFrame({
        "subject": [f"s{number:02d}" for number in range(40)], "session": "ses-M000", "split": "train",
        "diagnosis": np.where(ill, "AD", "CN"), "age": age, "severity": 0.1 + 0.9 * ill,
        "hippocampus_mm3": 9000 - 20 * age, "ventricle_mm3": 30000 + 400 * ill,
    })  # fmt: skip
    ball = soft_ball(6.0)[0, 0].numpy() > 0.7
    regions = {47: ball, 51: np.roll(ball, 4, 0)}

    def read_regions(rows, labels):
        part = sum(regions.get(label, np.zeros(ball.shape)) for label in labels).astype(np.float32)
        return np.stack([part] * len(rows))

    return Context(
        model=SimpleNamespace(), table=table, volumes=None, posterior=None, embeddings=rng.standard_normal((40, 4)),
        untrained=None, out=tmp_path, spacing=(2.0, 2.0, 2.0), regions=read_regions,
    )  # fmt: skip


def test_slopes_of_the_cohort_are_per_unit_of_alpha(context):
    found = measure_cohort_slopes(context, Regression("age"), AGE, ["hippocampus"], 50)["hippocampus"]
    np.testing.assert_allclose(found, -20 * 8, rtol=1e-6)
    probe = Classification("diagnosis", "AD", "CN")
    assert measure_cohort_slopes(context, probe, DISEASE, ["ventricle"], 5)["ventricle"][0] == pytest.approx(400)
    twice = direction(DISEASE.calibration, PublishedStep())  # sqrt(4), which is the distance between the classes
    assert measure_cohort_slopes(context, probe, twice, ["ventricle"], 5)["ventricle"][0] == pytest.approx(400)
    former = Direction(np.zeros(4), np.ones(4), np.eye(4)[0])
    assert measure_cohort_slopes(context, probe, former, ["ventricle"], 5) == {}


def test_alpha_1_of_a_diagnosis_is_the_difference_in_severity_of_the_training_scans(context):
    assert expected_factor(context, DISEASE, "severity") == pytest.approx(0.9)
    assert expected_factor(context, AGE, "age") == pytest.approx(8)
    assert expected_factor(context, Direction(np.zeros(4), np.ones(4), np.eye(4)[0]), "age") is None


def test_growth_between_two_images_becomes_a_volume(context):
    """A ball as bright as a hippocampus that grows by a tenth along each axis; there are no labels of amygdalae."""
    anatomy = Anatomy(context)
    assert anatomy.registered == ["hippocampus"]
    before, after = (torch.cat([soft_ball(radius)] * 2) for radius in (6.0, 6.6))
    found = anatomy.grown_volumes([0, 1], before, after)["hippocampus"] / context.table["hippocampus_mm3"][:2]
    np.testing.assert_allclose(found, 1.1**3, rtol=0.1)
    same = anatomy.grown_volumes([0, 1], before, before)["hippocampus"]
    np.testing.assert_allclose(same, context.table["hippocampus_mm3"][:2], rtol=1e-3)


def test_without_scans_to_edit_the_evaluation_says_which_setting_chooses_them(context):
    probe = Classification("diagnosis", "AD", "CN")
    assert dict(Manipulation({"diagnosis": probe}, Pattern(), Editor())(context)) == {}
    assert "evaluation.manipulation.splits" in context.skipped[0]
