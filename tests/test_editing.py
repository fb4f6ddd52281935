"""Tests directions and edits on a cohort with planted effects.

Directions find the planted effects, from the training rows only, and without nuisance effects where these are removed;
an edit has the stated length; an editor passes its settings on to the model; stored readouts read back or are refused.
"""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ldae.diffusion.code import Code
from ldae.editing.direction import Direction
from ldae.editing.directions import (
    FittingRows,
    HeldFixed,
    MeanDifference,
    Pattern,
    ProjectedOut,
    Shrunken,
    Weights,
    find_direction,
    nuisance_design,
)
from ldae.editing.editor import Editor
from ldae.editing.frozen_probes import EMBEDDING, FrozenProbe, write_frozen_probes
from ldae.editing.linear_model import LinearModel
from ldae.editing.readouts import Readouts
from ldae.editing.units import AlphaScale, Calibration, PublishedStep
from ldae.evaluation.probes.targets import Classification, Regression
from ldae.utils.errors import UserError

DIM = 6
DIAGNOSIS = Classification("diagnosis", "AD", "CN")


@pytest.fixture
def cohort():
    """300 subjects, 200 of them for training: y_0 follows the diagnosis, y_1 follows age, and AD subjects are older."""
    rng = np.random.default_rng(0)
    rows, embeddings = [], []
    for subject in range(300):
        ill = subject % 2
        age = 65 + 10 * ill + rng.normal(0, 5)
        y = 0.2 * rng.standard_normal(DIM)
        y[:2] += ill, (age - 70) / 10
        rows.append((f"sub-{subject:03d}", "AD" if ill else "CN", age, "train" if subject < 200 else "test"))
        embeddings.append(y)
    table = pd.DataFrame(rows, columns=["subject", "diagnosis", "age", "split"])
    return SimpleNamespace(table=table, embeddings=np.array(embeddings, np.float32), train=np.arange(200))


def find(cohort, estimator, probe=DIAGNOSIS):
    return find_direction(estimator, probe, cohort.table, cohort.embeddings, cohort.train)


@pytest.mark.parametrize("estimator", [Weights(), Pattern(), MeanDifference(), Shrunken(0.3)])
def test_every_estimator_finds_a_planted_direction(cohort, estimator):
    """Without the age effect, only y_0 follows the diagnosis; the sign is towards AD."""
    cohort.embeddings[:, 1] = cohort.embeddings[:, 2]
    found = find(cohort, estimator)
    assert np.linalg.norm(found.unit) == pytest.approx(1)
    assert found.unit[0] > 0.85


@pytest.mark.parametrize("estimator", [Weights(), Pattern(), HeldFixed(MeanDifference(), ["age"]), Shrunken()])
def test_directions_do_not_depend_on_other_rows(cohort, estimator):
    before = find(cohort, estimator)
    cohort.embeddings[200:] = 1e3
    cohort.table.loc[200:, "age"] = -50
    np.testing.assert_array_equal(before.step(), find(cohort, estimator).step())


def test_the_direction_of_a_number_points_to_larger_values(cohort):
    assert find(cohort, MeanDifference(), Regression("age")).unit[1] > 0.5


def test_nuisance_effects_are_held_fixed_or_projected_out(cohort):
    """The raw difference contains the age effect on y_1, the adjusted directions almost nothing or nothing of it."""
    raw = find(cohort, MeanDifference()).unit
    fixed, projected = (find(cohort, kind(MeanDifference(), ["age"])) for kind in (HeldFixed, ProjectedOut))
    assert raw[1] > 0.4
    assert abs(fixed.unit[1]) < 0.1
    assert fixed.unit[0] > 0.9
    # The age effect on standardised y at a fixed diagnosis, by least squares.
    y = (cohort.embeddings[cohort.train] - fixed.mean) / fixed.std
    table = cohort.table.iloc[cohort.train]
    design = np.column_stack([np.ones(len(table)), table["diagnosis"] == "AD", table["age"]]).astype(float)
    effect = np.linalg.lstsq(design, y, rcond=None)[0][2]
    assert abs(projected.unit @ effect) < 1e-9 * np.linalg.norm(effect)


def test_nuisance_columns_may_be_numbers_categories_constant_or_missing(cohort):
    table = cohort.table.assign(sex=["F", "M"] * 150, constant=1.0)
    rows = FittingRows(cohort.embeddings, np.zeros(len(table)), table, DIAGNOSIS, 0)
    design = nuisance_design(rows, ["age", "sex", "constant", "missing", "diagnosis"])
    assert design.shape[1] == 2  # age and one column for sex
    np.testing.assert_allclose(design.mean(0), 0, atol=1e-9)


def test_full_shrinkage_is_the_mean_difference(cohort):
    np.testing.assert_allclose(find(cohort, Shrunken(1.0)).unit, find(cohort, MeanDifference()).unit)
    with pytest.raises(UserError, match="shrinkage"):
        Shrunken(0.0)


def test_directions_that_cannot_be_estimated_are_refused_with_the_reason(cohort):
    with pytest.raises(UserError, match="1 subjects"):
        find_direction(MeanDifference(), DIAGNOSIS, cohort.table, cohort.embeddings, np.arange(1))
    cohort.embeddings[:] = 1.0
    with pytest.raises(UserError, match="length zero"):
        find(cohort, MeanDifference())


def gaussian_cohort(seed=0, people=400, dim=24):
    """y of two classes 3 apart and of an age of 0.1 a year, along planted unit vectors, beside other variation."""
    rng = np.random.default_rng(seed)
    ill, age = np.arange(people) % 2, rng.normal(60, 12, people)
    axes = np.linalg.qr(rng.standard_normal((dim, 2)))[0].T
    y = np.outer(3.0 * ill, axes[0]) + np.outer(0.1 * (age - 60), axes[1]) + 0.4 * rng.standard_normal((people, dim))
    names = [f"s{i}" for i in range(people)]
    return y, pd.DataFrame({"subject": names, "diagnosis": np.where(ill, "AD", "CN"), "age": age}), axes


@pytest.mark.parametrize("factor", [1.0, 20.0])
@pytest.mark.parametrize("estimator", [Pattern(), MeanDifference()])
def test_alpha_1_is_the_distance_of_the_classes_whatever_the_scale_of_y(factor, estimator):
    y, table, axes = gaussian_cohort()
    found = find_direction(estimator, DIAGNOSIS, table, factor * y, np.arange(len(y)))
    np.testing.assert_allclose(found.step() @ axes[0] / factor, 3.0, rtol=0.05)
    assert found.amount_per_alpha() == pytest.approx(1)
    assert found.alpha_scale.meaning == "the mean distance from CN to AD in the training scans"
    # Moved by 1, the mean of one class lies at the mean of the other along the direction.
    ill = (table["diagnosis"] == "AD").to_numpy()
    low, high = factor * y[~ill].mean(0), factor * y[ill].mean(0)
    normal = found.unit / found.std
    assert found.edit(low[None], 1.0)[0] @ normal == pytest.approx(high @ normal)


@pytest.mark.parametrize("estimator", [Pattern(), MeanDifference(), Weights()])
def test_an_age_moves_by_years_as_the_probe_reads_it_and_as_people_differ(estimator):
    """By 10 years: the read-out moves by 10, and y as far as the planted effect of age, 0.1 a year."""
    y, table, axes = gaussian_cohort()
    age = Regression("age", bias_correction=True)
    found = find_direction(estimator, age, table, y, np.arange(len(y)))
    moved = found.edit(y[:5], found.alpha_for(10))
    read = [found.readout.unbiased(found.readout.predict(part)) for part in (y[:5], moved)]
    np.testing.assert_allclose(read[1] - read[0], 10, rtol=1e-6)
    np.testing.assert_allclose((moved - y[:5]) @ axes[1], 1.0, rtol=0.1)
    assert found.amount_per_alpha() == pytest.approx(table["age"].std(ddof=0))
    assert found.alpha_scale.meaning.startswith("one standard deviation of age in the training scans, 1")
    assert found.alpha_scale.meaning.endswith(" years")


def test_the_published_unit_is_a_step_of_sqrt_dim_and_keeps_the_calibration():
    y, table, _ = gaussian_cohort()
    rows = np.arange(len(y))
    published = find_direction(Pattern(), DIAGNOSIS, table, y, rows, alpha=PublishedStep())
    assert np.linalg.norm(published.step() / published.std) == pytest.approx(24**0.5)
    ours = find_direction(Pattern(), DIAGNOSIS, table, y, rows)
    assert published.amount_per_alpha() == pytest.approx(24**0.5 / ours.alpha_scale.length)


def test_directions_read_back_with_their_unit_and_older_ones_keep_their_meaning():
    y, table, _ = gaussian_cohort()
    found = find_direction(Pattern(), Regression("age"), table, y, np.arange(len(y)))
    again = Direction.from_dict(json.loads(json.dumps(found.to_dict())))
    assert (again.scale, again.calibration) == (found.scale, found.calibration)
    np.testing.assert_array_equal(again.step(), found.step())
    np.testing.assert_array_equal(again.readout.coef, found.readout.coef)
    former = Direction.from_dict({name: found.to_dict()[name] for name in ("mean", "std", "unit")})
    np.testing.assert_allclose(former.step(), found.std * 24**0.5 * found.unit)
    assert former.alpha_scale.meaning == "a step of sqrt(24) along the unit direction in standardised y"
    assert former.amount_per_alpha() is None
    with pytest.raises(
        UserError, match=r"without a calibration: run .*manipulation.*\(--alpha\), of which 1 is a step"
    ):
        former.alpha_for(10)


def test_two_classes_cannot_be_moved_by_a_number():
    y, table, _ = gaussian_cohort()
    found = find_direction(Pattern(), DIAGNOSIS, table, y, np.arange(len(y)))
    with pytest.raises(UserError, match=r"two classes, CN and AD, and is no number: give alpha \(--alpha\)") as error:
        found.alpha_for(10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0.0, float("nan"), float("inf")])
def test_damaged_units_are_refused(length):
    with pytest.raises(ValueError, match="not a"):
        Calibration.from_dict({"column": "age", "classes": None, "length": length, "deviation": 1.0})
    with pytest.raises(ValueError, match="not a positive"):
        AlphaScale.from_dict({"length": length, "meaning": ""})


def test_a_label_that_does_not_change_along_a_direction_cannot_be_calibrated():
    y, table, _axes = gaussian_cohort()
    fixed = SimpleNamespace(estimate=lambda sample: np.eye(25)[24])
    y = np.column_stack([y, np.tile([1.0, -1.0, -1.0, 1.0], 100)])  # the same in both classes
    with pytest.raises(UserError, match="cannot be calibrated"):
        find_direction(fixed, DIAGNOSIS, table, y, np.arange(len(y)))


def test_alpha_has_the_stated_unit():
    """alpha = 1 is a step of sqrt(dim) along the unit direction in standardised y, for tensors and arrays alike."""
    direction = Direction(np.full(4, 5.0), np.full(4, 3.0), np.array([0.0, 1.0, 0.0, 0.0]))
    y = torch.full((2, 4), 5.0)
    expected = [[5.0, 5.0 + 2.5 * 2 * 3, 5.0, 5.0]] * 2
    assert direction.edit(y, 2.5).tolist() == expected
    assert direction.edit(y.numpy(), 2.5).tolist() == expected
    stored = json.loads(json.dumps(direction.to_dict()))
    np.testing.assert_array_equal(Direction.from_dict(stored).step(), direction.step())


class RecordingModel:
    """Records how it is asked to invert and to decode."""

    def invert(self, z, y, steps=None, **settings):
        self.inverted = {"steps": steps, **settings}
        return Code(z)

    def decode(self, code, y, steps=None, **settings):
        self.decoded = {"steps": steps, **settings}
        return code.z


def test_an_editor_passes_its_settings_on():
    model, z = RecordingModel(), torch.zeros(2, 3, 4, 4, 4)
    editor = Editor(steps=7, depth=0.6, renoise=0.25, strength=2.0)
    editor.decode(model, editor.invert(model, z, torch.zeros(2, DIM), 1, [3, 8]), torch.zeros(2, DIM))
    assert model.decoded == {"steps": 7, "strength": 2.0}
    noise = model.inverted.pop("noise")
    assert model.inverted == {"steps": 7, "strength": 2.0, "depth": 0.6, "renoise": 0.25}
    assert not torch.equal(noise[0], noise[1])
    editor.invert(model, z[:1], torch.zeros(1, DIM), 1, [8])
    assert torch.equal(model.inverted["noise"][0], noise[1])  # keyed by the scan, not by its place in the batch


def test_settings_of_an_editor_are_replaced_where_they_are_given():
    editor = Editor(steps=7, depth=0.6, renoise=0.25, strength=2.0)
    changed = editor.with_settings(depth=0.9, steps=None)
    assert vars(changed) == {"steps": 7, "depth": 0.9, "renoise": 0.25, "strength": 2.0}
    assert editor.depth == 0.6


@pytest.fixture
def stored(tmp_path):
    """Paths of probes.json and directions.json of a model with weights "w"."""
    model = LinearModel("diagnosis", np.zeros(DIM), np.ones(DIM), np.arange(DIM) - 2.0, 0.1, classes=("CN", "AD"))
    write_frozen_probes(tmp_path / "probes.json", {"diagnosis": {EMBEDDING: FrozenProbe([], model)}}, "w")
    direction = Direction(np.zeros(DIM), np.ones(DIM), np.eye(DIM)[0])
    text = {"weights": "w", "editor": vars(Editor(depth=0.5)), "directions": {"age": direction.to_dict()}}
    (tmp_path / "directions.json").write_text(json.dumps(text))
    return tmp_path / "probes.json", tmp_path / "directions.json"


def test_readouts_read_back_as_they_were_stored(stored):
    readouts = Readouts.read(*stored, "w")
    assert readouts.names == ["age", "diagnosis"]
    assert readouts.editor.depth == 0.5
    assert readouts.direction("age").unit.tolist() == np.eye(DIM)[0].tolist()
    weights = readouts.probes["diagnosis"].coef
    np.testing.assert_allclose(readouts.direction("diagnosis").unit, weights / np.linalg.norm(weights))
    assert readouts.predict_label("diagnosis", np.zeros((1, DIM))) == ["AD 52 %"]
    assert readouts.predict_label("sex", np.zeros((1, DIM))) == []


def test_numbers_are_read_out_in_words_without_regression_to_the_mean():
    age = LinearModel("age", np.zeros(1), np.ones(1), np.array([5.0]), 60.0, bias=(30.0, 0.5))
    readouts = Readouts({"age": age}, {})
    assert readouts.predict_label("age", np.array([[1.0]])) == ["age 70.0 years"]
    assert readouts.describe_change("age", np.array([[0.3]]), np.array([[1.3]])) == ["age 63.0 -> 73.0 years"]
    ill = LinearModel("diagnosis", np.zeros(1), np.ones(1), np.array([1.0]), 0.0, classes=("CN", "AD"))
    change = Readouts({"ill": ill}, {}).describe_change("ill", np.array([[0.0]]), np.array([[2.0]]))
    assert change == ["AD 50 % -> 88 %"]
    assert readouts.describe_change("sex", np.zeros((1, 1)), np.zeros((1, 1))) == []


def test_the_probe_of_a_calibration_is_read_out_where_no_frozen_one_is_stored(stored):
    probes, directions = stored
    text = json.loads(directions.read_text())
    readout = LinearModel("age", np.zeros(DIM), np.ones(DIM), np.ones(DIM), 60.0)
    text["directions"]["age"]["readout"] = readout.to_dict()
    directions.write_text(json.dumps(text))
    readouts = Readouts.read(probes, directions, "w")
    assert readouts.predict_label("age", np.zeros((1, DIM))) == ["age 60.0 years"]
    assert set(readouts.probes) == {"age", "diagnosis"}


def test_readouts_of_other_networks_or_damaged_ones_are_refused(stored):
    probes, directions = stored
    for paths in ((probes, None), (None, directions)):
        with pytest.raises(UserError, match="another encoder"):
            Readouts.read(*paths, "other")
    directions.write_text('{"weights": "w", "directions": {"age": {}}}')
    with pytest.raises(UserError, match="damaged"):
        Readouts.read(None, directions, "w")
