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
from ldae.editing.directions import (
    Direction,
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


def test_readouts_of_other_networks_or_damaged_ones_are_refused(stored):
    probes, directions = stored
    for paths in ((probes, None), (None, directions)):
        with pytest.raises(UserError, match="another encoder"):
            Readouts.read(*paths, "other")
    directions.write_text('{"weights": "w", "directions": {"age": {}}}')
    with pytest.raises(UserError, match="damaged"):
        Readouts.read(None, directions, "w")
