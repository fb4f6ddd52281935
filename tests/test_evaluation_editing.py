"""Tests the evaluations of edits on a linear model, for which every result is known.

Dose-response, true counterfactuals, interpolation and variation give the numbers that are computed by hand; pictures
are written.
"""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hydra.utils import instantiate

from ldae.config import check_constructor_arguments, compose_config
from ldae.data.nifti import BadScan
from ldae.diffusion.code import Code
from ldae.editing.direction import Direction
from ldae.editing.directions import HeldFixed, MeanDifference, Pattern, Weights
from ldae.editing.editor import Editor
from ldae.evaluation.context import Context
from ldae.evaluation.edits import counterfactuals, selection
from ldae.evaluation.edits import figures as edit_figures
from ldae.evaluation.edits.alpha_sweep import run_sweep, share_outside
from ldae.evaluation.edits.anatomy import Anatomy
from ldae.evaluation.edits.counterfactuals import (
    Counterfactual,
    CounterfactualRenderer,
    ExchangeRate,
    compare_with_counterfactuals,
)
from ldae.evaluation.edits.edited_scans import embed_edited_scans
from ldae.evaluation.edits.effects import correlation, slope, spearman, weighted_median
from ldae.evaluation.edits.heldout_probe import split_subjects_in_halves
from ldae.evaluation.edits.interpolation import Interpolation
from ldae.evaluation.edits.inverted_scans import invert_scans
from ldae.evaluation.edits.manipulation import Manipulation
from ldae.evaluation.edits.visits import find_triples, spread_over_subjects
from ldae.evaluation.images.variation import Variation
from ldae.evaluation.probes.targets import Classification, Regression
from ldae.utils.errors import UserError

SHAPE, DIM = (10, 12, 10), 6
VENTRICLE, HIPPOCAMPUS = (slice(4, 6), slice(5, 7), slice(4, 7)), (slice(2, 3), slice(3, 5), slice(3, 4))
RIM = (slice(6, 7), slice(5, 7), slice(4, 7))
DIAGNOSIS = Classification("diagnosis", "AD", "CN")


def templates():
    """Effect of each number of y on the image: y_0 darkens one side of the ventricle's rim, y_1 brightens a region."""
    found = np.zeros((DIM, *SHAPE), np.float32)
    found[0][RIM] = -0.05
    found[1][7:9, 2:10, 2:4] = 0.1
    return torch.from_numpy(found)


def base():
    """The image of y = 0: a dark ventricle, bright tissue, and one side of the rim in between."""
    found = torch.full(SHAPE, 0.6)
    found[VENTRICLE], found[RIM] = 0.1, 0.35
    return found


class LinearModelOfBrains:
    """z = noise + y @ templates: y is measured in two regions, and z_T is the part of z that y does not explain."""

    device = torch.device("cpu")
    transform = None

    def __init__(self):
        self.templates = templates()

    def embed(self, x):
        y = torch.zeros(len(x), DIM)
        for index in (0, 1):
            template = self.templates[index]
            y[:, index] = ((x[:, 0] - base()) * template).sum((1, 2, 3)) / template.square().sum()
        return y

    def compress(self, x):
        return x.clone()

    def decompress(self, z):
        return z.clamp(0, 1)

    def image_of(self, y):
        """What y explains, (B, 1, *SHAPE)."""
        return torch.einsum("bd,dxyz->bxyz", y, self.templates)[:, None]

    def invert(self, z, y, steps=None, strength=None, depth=1.0, noise=None, renoise=0.0):
        return Code(z - self.image_of(y), None, depth)

    def decode(self, code, y, steps=None, strength=None):
        noise = code.z if isinstance(code, Code) else base() + 0.01 * code
        return self.decompress(noise + self.image_of(y))


@pytest.fixture
def context(tmp_path):
    """60 subjects, half with three visits. AD darkens the rim; age correlates with AD and brightens the region."""
    rng = np.random.default_rng(0)
    rows, ys = [], []
    for subject in range(60):
        sick, split = subject % 2, "train" if subject < 40 else "val" if subject < 48 else "test"
        age = 65 + 10 * sick + rng.normal(0, 5)
        for months in (0, 6, 24) if subject % 4 < 2 else (0,):
            rows.append((f"sub-{subject:03d}", f"ses-M{months:03d}", months, "AD" if sick else "CN", age, split))
            y = 0.2 * rng.standard_normal(DIM)
            y[0] += sick + months / 24
            y[1] += (age - 70) / 10
            ys.append(y)
    table = pd.DataFrame(rows, columns=["subject", "session", "months", "diagnosis", "age", "split"])
    y, model = torch.tensor(np.array(ys), dtype=torch.float32), LinearModelOfBrains()
    images = (base() + model.image_of(y)).clamp(0, 1)
    regions = {51: np.zeros(SHAPE, np.float32), 47: np.zeros(SHAPE, np.float32)}
    regions[51][VENTRICLE] = 1
    regions[47][HIPPOCAMPUS] = 1
    return Context(
        model=model,
        table=table,
        volumes=lambda rows: images[list(rows)],
        posterior=None,
        embeddings=y.numpy(),
        untrained=None,
        out=tmp_path,
        spacing=(2.0, 2.0, 2.0),
        regions=lambda rows, labels: np.stack([sum(regions.get(n, np.zeros(SHAPE)) for n in labels)] * len(list(rows))),
    )


def test_numbers_of_effects_by_hand():
    x = np.array([-1.0, 0.0, 1.0, 2.0])
    y = np.array([[1.0, 2, 3, 9], [4, 3, 2, 1], [1, 1, 1, 1], [1, 3, 2, 4]])
    np.testing.assert_allclose(spearman(x, y), [1, -1, 0, 0.8])
    np.testing.assert_allclose(slope(x, np.array([[1.0, 3, 5, 7]])), [2])
    weights = np.array([[1, 1, 1, 1], [0, 3, 0, 1]])
    np.testing.assert_allclose(weighted_median(np.array([1.0, 2.0, np.nan, 10.0]), weights), [2, 2])
    mask = np.ones((2, 2, 1), bool)
    a = np.arange(4.0).reshape(2, 2, 1)
    assert correlation(a, 5 - 2 * a, mask) == pytest.approx(-1)
    assert np.isnan(correlation(a, 0 * a, mask))
    change, region = np.zeros((1, 2, 2, 2)), np.zeros((2, 2, 2), bool)
    change[0, 0, 0], region[0, 0, 0] = -3, True
    assert share_outside(change, np.ones_like(change, bool), region)[0] == pytest.approx(0.5)


def test_halves_share_no_subject_and_have_both_classes():
    subjects = np.repeat([f"s{i}" for i in range(20)], 3)
    truth = np.repeat(np.arange(20) % 4 == 0, 3).astype(float)
    member = split_subjects_in_halves(subjects, truth, 0)
    assert not set(subjects[member]) & set(subjects[~member])
    assert truth[member].sum() in (6, 9)
    assert member.sum() == 30


def test_manipulation_of_a_planted_effect(context):
    """Edits darken the rim in proportion to alpha: the ventricles of every scan grow, and nothing else changes."""
    evaluator = Manipulation(
        {"diagnosis": DIAGNOSIS, "age": Regression("age"), "nothing": Regression("no_such_column")},
        HeldFixed(MeanDifference(), ["age", "diagnosis"]), Editor(), alphas=[-0.6, -0.3, 0, 0.3, 0.6], shown=0.3,
        scans=6, batch_size=4, resamples=20,
    )  # fmt: skip
    metrics = dict(evaluator(context))
    assert metrics["manipulation/diagnosis/scans"] == 6
    assert metrics["manipulation/diagnosis/ventricle_spearman_share"] == 1
    assert metrics["manipulation/diagnosis/ventricle_slope"] > 4
    low, high = (metrics[f"manipulation/diagnosis/ventricle_slope_{end}"] for end in ("low", "high"))
    assert low <= metrics["manipulation/diagnosis/ventricle_slope"] <= high
    assert metrics["manipulation/diagnosis/independent_right"] == 1
    assert metrics["manipulation/diagnosis/independent_slope"] > 0
    assert metrics["manipulation/diagnosis/reversibility_ssim_mask"] > 0.999
    assert (
        metrics["manipulation/diagnosis/identity_ssim_mask"] < metrics["manipulation/diagnosis/reversibility_ssim_mask"]
    )
    assert metrics["manipulation/diagnosis/outside_share"] < metrics["manipulation/age/outside_share"]
    assert not any(name.startswith("manipulation/nothing") for name in metrics)
    names = {path.name for path in context.out.iterdir()}
    stem = "manipulation_diagnosis"
    pictures = {f"{stem}_{name}" for name in ("dose.png", "mean.png", "1.png", "2.gif")}
    assert {f"{stem}.csv", f"{stem}_scans.csv", *pictures} <= names
    stored = json.loads((context.out / "directions.json").read_text())["directions"]
    assert set(stored) == {"diagnosis", "age"}


def test_training_scans_are_edited_along_a_direction_that_was_fitted_without_them(context):
    seen = []

    class Recorded:
        def estimate(self, sample):
            seen.append(set(sample.table["subject"]))
            return MeanDifference().estimate(sample)

    evaluator = Manipulation(
        {"diagnosis": DIAGNOSIS},
        Recorded(),
        Editor(),
        [-0.3, 0, 0.3],
        0.3,
        4,
        pictures=0,
        resamples=5,
        splits=["train"],
    )
    metrics = dict(evaluator(context))
    edited = set(pd.read_csv(context.out / "manipulation_diagnosis.csv")["subject"])
    assert metrics["manipulation/diagnosis/ventricle_spearman_share"] == 1
    assert len(edited) == 4
    assert seen[0] == set(context.table["subject"][context.table["split"] == "train"])  # stored, for `ldae manipulate`
    assert seen[1] == seen[0] - edited


def test_scans_on_their_own_grid_are_embedded_with_the_change_added(context):
    """What is embedded is the view of the scan plus the change, and not the decoded image."""
    added = []

    def open_scan(row):
        return SimpleNamespace(edited=lambda after, before: added.append(after - before) or row)

    context.open_scan = open_scan
    context.model = SimpleNamespace(
        view=lambda image: np.full((1, 2), image, np.float32), embed_views=lambda views: 10 * views[:, 0], device="cpu"
    )
    edited, unedited = torch.full((2, 1, *SHAPE), 0.7), torch.full((2, 1, *SHAPE), 0.5)
    assert embed_edited_scans(context, [3, 5], edited, unedited).tolist() == [[30.0, 30.0], [50.0, 50.0]]
    torch.testing.assert_close(added[0], torch.full((1, *SHAPE), 0.2))


def test_an_edited_scan_without_a_view_does_not_end_the_evaluation(context, caplog):
    def view(image):
        if image == 5:
            raise BadScan("no three tissues")
        return np.full((1, 2), image, np.float32)

    context.open_scan = lambda row: SimpleNamespace(edited=lambda after, before: row)
    context.model = SimpleNamespace(
        view=view, device="cpu", embed_views=lambda views: 10 * views[:, 0], embed=lambda x: x[:, 0, 0, 0, :2]
    )
    edited = torch.full((2, 1, *SHAPE), 0.5)
    assert embed_edited_scans(context, [3, 5], edited, edited).tolist() == [[30.0, 30.0], [0.5, 0.5]]
    assert "1 of 2 edited scans have no view" in caplog.text


def test_the_reversed_direction_has_no_spearman_share(context):
    backwards = SimpleNamespace(estimate=lambda sample: -MeanDifference().estimate(sample))
    evaluator = Manipulation({"d": DIAGNOSIS}, backwards, Editor(), [-0.3, 0, 0.3], 0.3, 4, pictures=0, resamples=5)
    metrics = dict(evaluator(context))
    assert metrics["manipulation/d/ventricle_spearman_share"] == 0
    assert metrics["manipulation/d/ventricle_spearman_median"] == -1


def test_alphas_must_contain_zero_and_what_is_shown():
    with pytest.raises(UserError, match="0 and"):
        Manipulation({}, Weights(), Editor(), alphas=[-1, 1], shown=1)


@pytest.mark.parametrize("sign", [1, -1])
def test_difference_maps_correlate_with_those_of_a_true_counterfactual(context, sign):
    """A counterfactual that darkens the same rim gives a correlation of 1, one that brightens it -1."""
    context.embeddings[:, 1:] = 0
    direction = Direction(np.zeros(DIM), np.ones(DIM), np.eye(DIM)[0])
    anatomy, editor = Anatomy(context), Editor()
    template = context.model.templates[:1]

    def render(row, factor, change):
        return Counterfactual(
            context.volumes([row])[0] + sign * change * template, {"ventricle": 1000.0 * (1 + change)}
        )

    scans = invert_scans(context, editor, anatomy, context.rows("test")[:3])
    sweep = run_sweep(context, editor, anatomy, direction, scans, [-0.2, 0.0, 0.2])
    found = compare_with_counterfactuals(
        context, anatomy, ExchangeRate(SimpleNamespace(render=render), "severity", 0.5), sweep, 0.2
    )
    np.testing.assert_allclose(found.metrics["difference_r"], sign, atol=1e-3)
    np.testing.assert_allclose(found.metrics["difference_r_ceiling"], 1, atol=1e-3)
    np.testing.assert_allclose(found.metrics["change_true"], 200)
    error = np.abs(found.metrics["change_decoded"] - 200)
    np.testing.assert_allclose(found.metrics["ventricle_error"], error)


def test_the_exchange_rate_stays_within_the_range_of_the_generator():
    rate = ExchangeRate(None, "age", 10.0)
    assert rate.change(-0.5) == -5
    assert rate.change(9) == 25


def test_counterfactuals_of_a_phantom_are_its_stored_scan_with_another_severity(tmp_path):
    """With its own severity it is the stored scan without noise; with a higher one the ventricles are larger."""
    from ldae.data.phantom import make_cohort
    from ldae.data.transforms import Transform

    table = pd.read_csv(make_cohort(tmp_path, 1, 3, 8.0, (24, 28, 24), workers=1, progress=False))
    table["path"] = [str(tmp_path / path) for path in table["path"]]
    transform = Transform((24, 28, 24), 8.0)
    renderer = CounterfactualRenderer(SimpleNamespace(table=table, model=SimpleNamespace(transform=transform)))
    assert renderer.available
    same, worse = renderer.render(0), renderer.render(0, "severity", 0.8)
    stored = transform(table["path"][0])
    assert correlation(np.asarray(same.volume), stored, stored > 0) > 0.98
    assert same.volumes["ventricle"] == pytest.approx(table["ventricle_mm3"][0], rel=1e-3)
    rise = renderer.ventricle_slope([0], "severity")
    assert worse.volumes["ventricle"] - same.volumes["ventricle"] == pytest.approx(0.8 * rise, rel=0.4)
    others = SimpleNamespace(table=table.drop(columns="severity"), model=SimpleNamespace(transform=transform))
    assert not CounterfactualRenderer(others).available


def test_triples_and_nearest_visit():
    table = pd.DataFrame({"subject": ["b", "a", "a", "a", "b", "a"], "months": [0, 24, 0, 6, 12, 12]})
    found = find_triples(table, np.arange(6))
    assert [(t.start, t.target, t.end) for t in found] == [(2, 3, 5), (2, 3, 1), (2, 5, 1), (3, 5, 1)]
    assert [triple.t for triple in found] == [0.5, 0.25, 0.5, pytest.approx(1 / 3)]
    assert [t.nearest for t in found] == [2, 2, 2, 3]
    assert [triple.months for triple in found] == [12, 24, 24, 18]


def test_few_triples_are_of_many_subjects_and_of_different_gaps():
    table = pd.DataFrame({"subject": np.repeat(list("abc"), 4), "months": [0, 12, 36, 72] * 3})
    triples = find_triples(table, np.arange(12))
    subjects = table["subject"].to_numpy()[[triple.target for triple in triples]]
    assert spread_over_subjects(triples, subjects, None) == triples
    few = spread_over_subjects(triples, subjects, 3)
    assert [table["subject"][triple.target] for triple in few] == ["a", "b", "c"]
    assert len({triple.rows[0] % 4 + 10 * triple.months for triple in few}) > 1


def test_interpolation_numbers_by_hand(context):
    """Visits at months 0, 6 and 24, so t = 1/4. All is linear, so that our prediction and both blends are one image."""
    metrics = dict(Interpolation(Editor(depth=1.0), resamples=20)(context))
    assert metrics["interpolation/triples"] == len(find_triples(context.table, context.rows("test"))) == 6
    row = pd.read_csv(context.out / "interpolation.csv").query("against == 'real'").set_index(["subject", "method"])
    triple = find_triples(context.table, context.rows("test"))[0]
    x = context.volumes(triple.rows).numpy()
    subject = context.table["subject"].iloc[triple.target]
    blend = 0.75 * x[0] + 0.25 * x[2]
    assert row.loc[(subject, "voxel"), "mse"] == pytest.approx(((blend - x[1]) ** 2).mean(), rel=1e-3)
    assert row.loc[(subject, "latent"), "mse"] == pytest.approx(row.loc[(subject, "voxel"), "mse"], rel=1e-3)
    assert row.loc[(subject, "nearest"), "mse"] == pytest.approx(((x[0] - x[1]) ** 2).mean(), rel=1e-3)
    assert metrics["interpolation/ldae/real/mse_gap24"] == pytest.approx(metrics["interpolation/ldae/real/mse"])
    gain = metrics["interpolation/nearest/real/mse"] - metrics["interpolation/ldae/real/mse"]
    assert metrics["interpolation/gain/real/mse_over_nearest"] == pytest.approx(gain)
    assert "interpolation/ldae/autoencoded/ventricle_error_high" in metrics
    assert (context.out / "interpolation_1.gif").exists()


def test_variation_of_a_model_whose_y_determines_the_image(context):
    """Variants differ only by noise of standard deviation 0.01, and the probe's prediction stays the same."""
    metrics = dict(Variation({"diagnosis": DIAGNOSIS}, scans=6, variants=12, resamples=20)(context))
    assert metrics["variation/std_mask"] == pytest.approx(0.01, rel=0.1)
    assert metrics["variation/diagnosis_agreement"] > 0.95
    assert metrics["variation/diagnosis_r"] > 0.95
    assert metrics["variation/diagnosis_within"] < 0.1
    assert metrics["variation/ventricle_cv"] > 0
    assert (context.out / "variation.png").exists()


def test_selection_prefers_the_direction_that_is_true(context, monkeypatch):
    """The true change darkens the rim. The raw difference brightens the region of age too; held fixed, it does not."""

    def render(row, factor, change):
        return Counterfactual(context.volumes([row])[0] + change * context.model.templates[:1], {"ventricle": 1000.0})

    renderer = SimpleNamespace(available=True, render=render)
    monkeypatch.setattr(selection, "CounterfactualRenderer", lambda context: renderer)
    estimators = {"raw": MeanDifference(), "fixed": HeldFixed(MeanDifference(), ["age"])}
    evaluator = selection.Selection(
        {"diagnosis": DIAGNOSIS}, estimators, Editor(), depths=[0.5, 1.0], renoises=[0.0], strengths=[None],
        alphas=[0.3], scans=3, finalists=1,
    )  # fmt: skip
    metrics = dict(evaluator(context))
    assert metrics["selection/diagnosis/fixed/difference_r"] > metrics["selection/diagnosis/raw/difference_r"]
    assert metrics["selection/diagnosis/best_monotone"] == 1
    table = pd.read_csv(context.out / "selection_diagnosis.csv")
    assert table["estimator"].iloc[0] == "fixed"
    assert len(table) == 4  # two estimators with the default editor, then two depths of the better one
    assert (context.out / "selection_diagnosis.png").exists()


def test_an_edit_without_effect_is_compared_with_a_real_change(context, monkeypatch):
    nothing = Direction(np.zeros(DIM), np.ones(DIM), np.eye(DIM)[DIM - 1])
    renderer = SimpleNamespace(available=True, ventricle_slope=lambda rows, factor: 10000.0)
    monkeypatch.setattr(counterfactuals, "CounterfactualRenderer", lambda context: renderer)
    rate = counterfactuals.calibrate_exchange_rate(context, Editor(), Anatomy(context), nothing, "severity", 4, 4, 0.5)
    assert rate.change(0.5) == pytest.approx(0.3)


def test_monotone_settings_are_ranked_first():
    table = pd.DataFrame({"difference_r": [0.9, 0.4, 0.6], "monotone": [0.5, 1.0, 0.8]})
    assert selection.rank_settings(table)["difference_r"].tolist() == [0.6, 0.4, 0.9]


def test_animation_runs_forth_and_back(tmp_path):
    from PIL import Image

    frames = np.random.default_rng(0).random((4, *SHAPE))
    edit_figures.write_animation(tmp_path / "a.gif", frames, list("abcd"), (5, 6, 5))
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 6


def test_the_config_builds_the_evaluators_it_names():
    config = compose_config(
        "evaluate", ["evaluation=[manipulation,selection,interpolation,variation]", "experiment=demo"]
    )
    check_constructor_arguments(config.evaluation)
    built = {name: instantiate(node) for name, node in config.evaluation.items()}
    assert isinstance(built["manipulation"].direction, Pattern)
    assert isinstance(built["manipulation"].editor, Editor)
    assert isinstance(built["interpolation"].editor, Editor)
    assert len(built["selection"].editors) == 16
