"""Tests the probes.

AD is the positive class, test rows do not influence the fit, folds are grouped by subject, baselines follow the same
protocol, stored probes predict exactly what fitted ones do, and another cohort is judged without a refit.
"""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from ldae.data.subsampling import subsample_by_subject
from ldae.editing.frozen_probes import read_frozen_probes
from ldae.editing.linear_model import LinearModel
from ldae.evaluation.context import Context
from ldae.evaluation.embeddings import (
    embed_parts,
    embed_rows,
    embeddings_key,
    load_or_compute_embeddings,
    parts_folder,
)
from ldae.evaluation.probes.blocks import Block
from ldae.evaluation.probes.evaluator import ExternalCohort, Probes, find_first_visits
from ldae.evaluation.probes.fitting import choose_settings, fit
from ldae.evaluation.probes.scaling import OneScale, PerFeature
from ldae.evaluation.probes.targets import Classification, Regression
from ldae.scans.ood_check import OodCheck
from ldae.utils.errors import UserError

DIAGNOSIS = {"positive": "AD", "negative": "CN"}


def cohort(out, subjects=120, seed=0, shift=2.0, splits=(0.7, 0.3)):
    """Two scans per subject. y contains disease (first number) and age (second); the untrained y is noise."""
    rng = np.random.default_rng(seed)
    sick = rng.integers(0, 3, subjects)  # CN, MCI, AD
    age = 70 + 6 * rng.standard_normal(subjects) + 2 * (sick == 2)
    kind = np.where(np.arange(subjects) < splits[0] * subjects, "train", "test")
    rows = [
        {"subject": f"s{i:03d}", "session": f"ses-M{m:03d}", "months": m, "path": f"{i}-{m}", "split": kind[i],
         "diagnosis": ["CN", "MCI", "AD"][sick[i]], "age": age[i] + m / 12, "sex": "MF"[i % 2],
         "ventricle_mm3": 20000 + 9000 * (sick[i] == 2) + 3000 * rng.standard_normal()}
        for i in range(subjects) for m in (0, 12)
    ]  # fmt: skip
    table = pd.DataFrame(rows)
    y = rng.standard_normal((len(table), 32)).astype(np.float32)
    y[:, 0] += shift * (table["diagnosis"] == "AD")
    y[:, 1] += 0.4 * (table["age"] - 70)
    noise = rng.standard_normal((len(table), 32)).astype(np.float32)
    latents = torch.from_numpy(rng.standard_normal((len(table), 2, 3, 3, 3)).astype(np.float32))
    volumes = torch.from_numpy(rng.random((len(table), 1, 4, 4, 4)).astype(np.float32))
    return Context(
        model=None, table=table, volumes=lambda r: volumes[list(r)], posterior=lambda r: (latents[r], latents[r]),
        embeddings=y, untrained=lambda draw: np.roll(noise, draw, axis=0), out=out, spacing=(4.5,) * 3, seed=0,
        weights="abc",
    )  # fmt: skip


def probes(**options):
    tasks = {"diagnosis": Classification("diagnosis", **DIAGNOSIS), "age": Regression("age")}
    return Probes(tasks, **{"resamples": 200, "pca_widths": [4, 8], **options})


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """Context and metrics of one evaluation."""
    context = cohort(tmp_path_factory.mktemp("evaluation"))
    return context, dict(probes()(context))


def test_the_disease_is_the_positive_class(judged):
    context, metrics = judged
    entry = read_frozen_probes(context.out / "probes.json")["diagnosis"]["embedding"]
    assert entry.model.classes == ("CN", "AD")
    assert entry.model.coef[0] > 0
    test = context.table[context.table["split"] == "test"]
    assert metrics["probe/diagnosis/tp"] + metrics["probe/diagnosis/fn"] == (test["diagnosis"] == "AD").sum()
    assert metrics["probe/diagnosis/tn"] + metrics["probe/diagnosis/fp"] == (test["diagnosis"] == "CN").sum()


def test_the_predictions_reproduce_the_metrics(judged):
    from sklearn.metrics import mean_absolute_error, roc_auc_score

    context, metrics = judged
    table = pd.read_csv(context.out / "diagnosis_predictions.csv")
    assert metrics["probe/diagnosis/auc"] == pytest.approx(roc_auc_score(table["truth"], table["embedding"]))
    ages = pd.read_csv(context.out / "age_predictions.csv")
    assert metrics["probe/age/mae"] == pytest.approx(mean_absolute_error(ages["truth"], ages["embedding"]))


def test_differences_are_positive_where_the_embedding_is_better(judged):
    _, metrics = judged
    assert metrics["baseline/untrained/diagnosis/auc_difference_low"] > 0
    assert metrics["baseline/untrained/age/mae_difference_low"] > 0
    for name in ("auc", "brier"):
        sign = {"auc": 1, "brier": -1}[name]
        gap = metrics[f"probe/diagnosis/{name}"] - metrics[f"baseline/pca/diagnosis/{name}"]
        assert metrics[f"baseline/pca/diagnosis/{name}_difference"] == pytest.approx(sign * gap)


def test_every_applicable_baseline_is_scored(judged):
    _, metrics = judged
    for name in ("mean", "age_sex", "pca", "untrained", "volumes"):
        assert f"baseline/{name}/diagnosis/auc" in metrics
    assert metrics["baseline/mean/diagnosis/auc"] == 0.5
    assert metrics["baseline/volumes/diagnosis/auc"] > 0.8
    mean, volumes = (metrics[f"baseline/{name}/age/mae"] for name in ("mean", "volumes"))
    share = (mean - metrics["probe/age/mae"]) / (mean - volumes)
    assert metrics["probe/age/mae_share_to_volumes"] == pytest.approx(share)
    assert "baseline/age_sex/age/mae" not in metrics  # age is one of its features
    assert metrics["probe/diagnosis/auc_age_adjusted"] > 0.8
    assert all(np.isfinite(metrics[f"probe/diagnosis/{name}"]) for name in ("auc_low", "auc_high", "mcc", "pr_auc"))


def test_poisoned_test_rows_change_no_coefficient(judged, tmp_path):
    context, _ = judged
    test = context.rows("test")
    y, table = context.embeddings.copy(), context.table.copy()
    y[test] = 1e3 * np.random.default_rng(9).standard_normal(y[test].shape)
    table.loc[test, "diagnosis"] = table.loc[test, "diagnosis"].map({"AD": "CN", "CN": "AD", "MCI": "MCI"})
    table.loc[test, ["age", "ventricle_mm3"]] = 1e4 * np.random.default_rng(8).random((len(test), 2))
    before = json.loads((context.out / "probes.json").read_text())
    dict(probes()(replace(context, embeddings=y, table=table, out=tmp_path)))
    assert json.loads((tmp_path / "probes.json").read_text()) == before


def test_a_poisoned_training_row_does_change_them(judged, tmp_path):
    """The test above is able to fail."""
    context, _ = judged
    y = context.embeddings.copy()
    y[context.rows("train")[0]] += 5
    dict(probes(baselines=[])(replace(context, embeddings=y, out=tmp_path)))
    before = read_frozen_probes(context.out / "probes.json")["age"]["embedding"].model
    after = read_frozen_probes(tmp_path / "probes.json")["age"]["embedding"].model
    assert not np.allclose(before.coef, after.coef)


@pytest.mark.parametrize("task", [Classification("diagnosis", **DIAGNOSIS), Regression("age")])
def test_no_subject_is_on_both_sides_of_a_fold(task):
    subjects = np.repeat([f"s{i}" for i in range(30)], 3)
    truth = np.repeat(np.arange(30) % 2, 3).astype(float)
    folds = list(task.folds(truth, subjects, seed=0))
    assert len(folds) == 5
    for inner, held in folds:
        assert not set(subjects[inner]) & set(subjects[held])


def scikit_learn_pipeline(task, width, strength, scaling):
    """The same model in scikit-learn's words."""
    from sklearn.decomposition import PCA
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    def fitted_on(x, truth):
        reduced = reduce.fit_transform(x)
        centre, factor = reduced.mean(0), np.sqrt(reduced.var(0).sum() / 768)
        scaler = StandardScaler() if scaling == PerFeature else FunctionTransformer(lambda x: (x - centre) / factor)
        return make_pipeline(reduce, scaler, estimator).fit(x, truth)

    estimator = Ridge(strength) if task.classes is None else LogisticRegression(C=strength, tol=1e-10, max_iter=5000)
    reduce = make_pipeline(SimpleImputer(), *([PCA(width, svd_solver="full")] if width else []))
    return fitted_on


@pytest.mark.parametrize("scaling", [OneScale, PerFeature])
@pytest.mark.parametrize("widths", [None, [3, 6]])
@pytest.mark.parametrize("task", [Classification, Regression])
def test_stored_arrays_predict_what_scikit_learn_does(task, widths, scaling):
    """Imputation, PCA and scaling as four arrays, stored as JSON, predict the same to 1e-6."""
    arguments = DIAGNOSIS if task is Classification else {}
    task = task("diagnosis", **arguments, scaling=scaling())
    rng = np.random.default_rng(5)
    x = 3 + rng.standard_normal((90, 12)) * np.arange(1, 13)
    x[::17, 2] = np.nan
    truth = (np.nan_to_num(x[:, 0]) > 3).astype(float)
    subjects = np.array([f"s{i // 2}" for i in range(90)])
    width, strength = choose_settings(task, [Block(x, widths)], truth, subjects, 0)
    pipeline = scikit_learn_pipeline(task, width, strength, scaling)(x, truth)
    expected = pipeline.predict(x) if task.classes is None else pipeline.predict_proba(x)[:, 1]
    model = fit(task, [Block(x, widths)], truth, subjects, 0)
    again = LinearModel.from_dict(json.loads(json.dumps(model.to_dict())))
    np.testing.assert_allclose(again.predict(x), expected, atol=1e-6, rtol=0)
    np.testing.assert_array_equal(again.coef, model.coef)


def test_more_features_than_scans_give_the_predictions_of_scikit_learn():
    """Where there are more voxels than scans, both are rotated into the span of the scans; new scans too."""
    rng = np.random.default_rng(7)
    x, new = 5 + rng.standard_normal((40, 300)) * np.linspace(0.1, 3, 300), 5 + rng.standard_normal((9, 300))
    truth, subjects = x[:, -40:].sum(1), np.array([str(i) for i in range(40)])
    for widths in ([4, 16], None):
        task = Regression("age", bias_correction=True)
        width, strength = choose_settings(task, [Block(x, widths)], truth, subjects, 0)
        pipeline = scikit_learn_pipeline(task, width, strength, OneScale)(x, truth)
        model = fit(task, [Block(x, widths)], truth, subjects, 0)
        np.testing.assert_allclose(model.predict(new), pipeline.predict(new), rtol=1e-8)
        assert model.bias is not None


def test_one_scale_keeps_a_steep_spectrum_that_standardisation_ruins():
    """Age is in the first of 60 components, the variances fall by a factor of 1000: as in maps of real brains."""
    rng = np.random.default_rng(3)
    size = np.logspace(0, -1.5, 60)
    x = rng.standard_normal((400, 60)) * size
    truth, subjects = 50 + 10 * x[:, :3].sum(1) + 4 * rng.standard_normal(400), np.arange(400).astype(str)
    errors = {}
    for scaling in (OneScale, PerFeature):
        model = fit(Regression("age", scaling=scaling()), x[:80], truth[:80], subjects[:80], 0)
        errors[scaling] = np.abs(model.predict(x[80:]) - truth[80:]).mean()
    assert errors[OneScale] < 0.85 * errors[PerFeature]


@pytest.mark.parametrize("task", [Classification("diagnosis", **DIAGNOSIS), Regression("age")])
def test_with_one_scale_a_rotation_the_unit_and_constant_features_change_nothing(task):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((60, 8)) * np.arange(1, 9)
    truth, subjects = (x[:, -1] + rng.standard_normal(60) > 0).astype(float), np.arange(60).astype(str)
    rotation = np.linalg.qr(rng.standard_normal((100, 100)))[0][:8]  # 8 numbers in 100 features
    changed = 7 * x @ rotation + 5
    before, after = fit(task, x, truth, subjects, 0), fit(task, changed, truth, subjects, 0)
    np.testing.assert_allclose(after.predict(changed), before.predict(x), atol=1e-4)


def test_pca_width_is_limited_by_the_number_of_columns():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((40, 6))
    subjects = np.array([str(i) for i in range(40)])
    width, _ = choose_settings(Regression("age"), [Block(x, [2, 500])], x @ np.ones(6), subjects, 0)
    assert width == 6


def test_constant_features_give_a_constant_prediction():
    """Features of a collapsed encoder: more columns than rows, and all rows are equal."""
    subjects = np.arange(40)
    for task, truth in (
        (Regression("age"), subjects + 50.0),
        (Classification("diagnosis", **DIAGNOSIS), subjects % 2.0),
    ):
        model = fit(task, np.full((40, 60), 3.0), truth, subjects.astype(str), 0)
        assert model.predict(np.full((5, 60), 3.0)) == pytest.approx([truth.mean()] * 5)


class Scripted:
    """A probe with given losses: `losses` maps a strength to one number per subject."""

    column, classes, bias_correction, scaling = "age", None, False, OneScale()

    def __init__(self, losses, tolerance=1.0):
        self.tolerance = tolerance
        self.found, self.strengths = losses, list(losses)
        self.seeds = []

    def solve(self, features, truth, strengths):
        return [(np.zeros(features.shape[1]), strength) for strength in strengths]

    def folds(self, truth, subjects, seed):
        self.seeds.append(seed)
        yield from Regression("age").folds(truth, subjects, seed)

    def losses(self, decision, truth):
        return np.array([self.found[strength][int(value)] for strength, value in zip(decision, truth, strict=True)])


@pytest.mark.parametrize(
    ("strong", "weak", "expected"),
    [
        # Worse for one subject, better for another: within the standard error of the difference.
        ([1.0] * 8 + [1.6, 0.8], [1.0] * 10, 100.0),
        # A little worse for every subject: significant, although subjects differ far more from each other.
        ([i + 0.1 for i in range(10)], list(range(10)), 1.0),
        # Equally good: the stronger penalty is chosen.
        (list(range(10)), list(range(10)), 100.0),
        # Better.
        ([0.0] * 10, [1.0] * 10, 100.0),
    ],
)
def test_the_strongest_penalty_that_is_as_good_as_the_best_is_chosen(strong, weak, expected):
    task = Scripted({100.0: strong, 1.0: weak})
    # The truth of a scan is the number of its subject; a subject with many scans counts once.
    subjects = np.repeat(np.arange(10), [1, 2, 1, 3, 1, 1, 2, 1, 1, 9])
    features = np.random.default_rng(0).standard_normal((len(subjects), 2))
    assert choose_settings(task, [Block(features)], subjects.astype(float), subjects.astype(str), 3) == (None, expected)
    assert len(set(task.seeds)) == len(task.seeds) > 1  # the folds were drawn more than once


def test_without_tolerance_the_lowest_loss_decides():
    subjects, features = np.arange(10), np.random.default_rng(0).standard_normal((10, 2))
    found = {100.0: [1.0] * 8 + [1.6, 0.8], 1.0: [1.0] * 10}  # within one standard error, see above
    for tolerance, expected in ((1.0, 100.0), (0.0, 1.0)):
        task = Scripted(found, tolerance)
        assert choose_settings(task, [Block(features)], subjects.astype(float), subjects.astype(str), 3) == (
            None,
            expected,
        )


def test_strengths_are_sorted_from_the_strongest_penalty():
    assert Classification("diagnosis", **DIAGNOSIS, strengths=[10.0, 0.1]).strengths == [0.1, 10.0]  # C
    assert Regression("age", strengths=[1.0, 100.0]).strengths == [100.0, 1.0]  # alpha


def test_another_cohort_is_scored_without_a_refit(judged, tmp_path):
    context, _ = judged
    other = cohort(tmp_path, subjects=80, seed=11, splits=(1.0, 0.0))
    metrics = dict(ExternalCohort(context.out / "probes.json", resamples=200)(other))
    assert metrics["external/probe/diagnosis/auc_low"] > 0.7
    assert metrics["external/baseline/untrained/diagnosis/auc_difference_low"] > 0
    assert metrics["external/baseline/untrained/age/mae_difference_low"] > 0
    assert metrics["external/baseline/mean/age/mae"] > metrics["external/probe/age/mae"]
    model = read_frozen_probes(context.out / "probes.json")["age"]["embedding"].model
    expected = np.abs(model.predict(other.embeddings) - other.table["age"]).mean()
    assert metrics["external/probe/age/mae"] == pytest.approx(expected)
    assert not (tmp_path / "probes.json").exists()


def test_another_encoder_and_a_missing_file_are_refused(judged, tmp_path):
    context, _ = judged
    with pytest.raises(UserError, match="another encoder"):
        dict(ExternalCohort(context.out / "probes.json")(replace(context, weights="xyz")))
    with pytest.raises(UserError, match="evaluation=probes"):
        dict(ExternalCohort(tmp_path / "probes.json")(context))


def test_a_cohort_without_volumes_lacks_only_that_baseline(judged, tmp_path, caplog):
    context, _ = judged
    other = cohort(tmp_path, subjects=40, seed=12)
    other.table = other.table.drop(columns=["ventricle_mm3"])
    metrics = dict(ExternalCohort(context.out / "probes.json", resamples=50)(other))
    assert "external/baseline/volumes/diagnosis/auc" not in metrics
    assert "external/baseline/pca/diagnosis/auc" in metrics
    assert "ventricle_mm3" in caplog.text
    assert any("baseline volumes is not computed for diagnosis" in text for text in other.skipped)


@pytest.mark.parametrize("damage", ["no AD", "no age", "no column", "tiny"])
def test_a_probe_without_usable_labels_is_skipped_with_one_line(tmp_path, caplog, damage):
    context = cohort(tmp_path, subjects=30)
    if damage == "no AD":
        context.table["diagnosis"] = context.table["diagnosis"].replace("AD", "CN")
    if damage == "no age":
        context.table["age"] = np.nan
    if damage == "no column":
        context.table = context.table.drop(columns="diagnosis")
    if damage == "tiny":
        context = replace(
            context, table=context.table[::12].reset_index(drop=True), embeddings=context.embeddings[::12],
            untrained=lambda draw: np.ones((5, 3)),
        )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        metrics = dict(probes(resamples=20)(context))
    skipped = "age" if damage == "no age" else "diagnosis"
    assert f"probe {skipped} is skipped" in caplog.text
    assert not any(name.startswith(f"probe/{skipped}/") for name in metrics)
    if damage not in ("tiny",):
        assert any(name.startswith("probe/") for name in metrics)


def test_a_skipped_probe_is_said_with_the_values_present_and_the_keys(tmp_path):
    context = cohort(tmp_path, subjects=30)
    context.table["diagnosis"] = context.table["diagnosis"].replace("AD", "Dementia")
    dict(probes(resamples=20)(context))
    (said,) = (text for text in context.skipped if text.startswith("probe "))
    assert "Dementia (" in said
    assert "CN (" in said
    assert "probe.diagnosis.positive" in said


@pytest.mark.parametrize("sex", ["12", "MM", "MW", None])
def test_age_and_sex_without_a_readable_sex_is_not_age_alone(judged, tmp_path, sex):
    context = cohort(tmp_path, subjects=30)
    if sex is None:
        context.table = context.table.drop(columns="sex")
    else:
        context.table["sex"] = context.table["sex"].map({"M": sex[0], "F": sex[1]})
    metrics = dict(probes(baselines=["age_sex", "mean"], resamples=20)(context))
    assert "baseline/mean/diagnosis/auc" in metrics
    assert not any(name.startswith("baseline/age_sex/") for name in metrics)
    (said,) = (text for text in context.skipped if "age_sex" in text and "diagnosis" in text)
    assert "no column 'sex'" in said if sex is None else f"{sex[1]} (" in said
    frozen = dict(ExternalCohort(judged[0].out / "probes.json", resamples=20)(context))
    # What was fitted on both sexes may be applied to a cohort of one sex, which is known.
    assert ("external/baseline/age_sex/diagnosis/auc" in frozen) == (sex == "MM")


def test_the_untrained_baseline_is_the_mean_of_its_draws(judged):
    """Mean, spread and differences, by hand from the stored predictions."""
    context, metrics = judged
    ages = pd.read_csv(context.out / "age_predictions.csv")
    errors = [(ages[f"untrained_{draw}"] - ages["truth"]).abs().mean() for draw in range(5)]
    assert metrics["baseline/untrained/age/mae"] == pytest.approx(np.mean(errors))
    assert metrics["baseline/untrained/age/mae_spread"] == pytest.approx(np.std(errors, ddof=1))
    difference = np.mean(errors) - metrics["probe/age/mae"]
    assert metrics["baseline/untrained/age/mae_difference"] == pytest.approx(difference)
    assert not any("untrained_" in name for name in metrics)


def test_an_untrained_baseline_of_an_earlier_version_is_skipped(judged, tmp_path):
    context, _ = judged
    stored = json.loads((context.out / "probes.json").read_text())
    for predictors in stored["probes"].values():
        predictors["untrained"] = predictors.pop("untrained_0")
        for draw in range(1, 5):
            del predictors[f"untrained_{draw}"]
    (tmp_path / "probes.json").write_text(json.dumps(stored))
    other = cohort(tmp_path, subjects=40, seed=12)
    metrics = dict(ExternalCohort(tmp_path / "probes.json", resamples=20)(other))
    assert not any("untrained" in name for name in metrics)
    assert any("untrained" in text and "evaluation=[probes]" in text for text in other.skipped)


def test_a_cohort_without_any_label_of_the_probes_is_refused(judged, tmp_path):
    other = cohort(tmp_path, subjects=20, seed=12)
    other.table = other.table.assign(diagnosis="", age=np.nan)
    with pytest.raises(UserError, match="no probe could be applied"):
        dict(ExternalCohort(judged[0].out / "probes.json", resamples=20)(other))


def test_scans_of_another_cohort_that_fail_the_out_of_distribution_check_are_listed(judged, tmp_path, caplog):
    other = cohort(tmp_path, subjects=20, seed=12)
    check = OodCheck(np.arange(64).reshape(4, 4, 4) / 64, 0.9, (0.5, 1.0))
    ramp = torch.arange(64.0).view(1, 1, 4, 4, 4) / 64
    other.model = SimpleNamespace(ood_check=check)
    other.volumes = lambda rows: torch.cat([ramp.flip(2) if row == 3 else ramp for row in rows])
    with caplog.at_level(logging.INFO):
        metrics = dict(ExternalCohort(judged[0].out / "probes.json", resamples=20)(other))
    assert metrics["external/ood/scans"] == 40
    assert metrics["external/ood/failed"] == 1
    assert "1 of 40 scans fail the out-of-distribution check" in caplog.text
    assert "s001 ses-M012" in caplog.text
    listed = pd.read_csv(tmp_path / "external_ood.csv")
    assert listed["subject"].tolist() == ["s001"]
    assert listed["reason"].str.contains("correlates").all()


def test_first_visits_only(tmp_path):
    context = cohort(tmp_path, subjects=60)
    assert find_first_visits(context.table).sum() == 60
    metrics = dict(probes(baselines=[], baseline_visits_only=True, resamples=20)(context))
    assert metrics["probe/age/scans"] == metrics["probe/age/subjects"] == 18


def test_embeddings_are_reused_only_for_the_same_weights_rows_and_scans(tmp_path):
    context = cohort(tmp_path, subjects=10)
    calls = []

    def compute():
        calls.append(1)
        return embed_rows(lambda x: x.flatten(1) / 3, lambda r: torch.tensor(r)[:, None].float(), 20, 7)

    path = tmp_path / "embeddings.csv"
    key = embeddings_key(context.table, "one", "scans")
    first = load_or_compute_embeddings(path, context.table, key, compute)
    again = load_or_compute_embeddings(path, context.table, key, compute)
    assert len(calls) == 1
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[:, 0], (torch.arange(20) / 3).numpy())
    other_keys = (
        embeddings_key(context.table, "two", "scans"),
        embeddings_key(context.table, "two", "other scans"),
        embeddings_key(context.table[::-1], "two", "other scans"),
    )
    for number, key in enumerate(other_keys, 2):
        load_or_compute_embeddings(path, context.table, key, compute)
        assert len(calls) == number
    assert list(pd.read_csv(path).columns) == ["subject", "session", "split", "y000"]


def test_a_small_sample_of_rows_prefers_new_subjects():
    subjects = ["a"] * 5 + ["b"] * 5 + ["c"]
    assert {subjects[row] for row in subsample_by_subject(np.arange(11), subjects, 3, seed=0)} == {"a", "b", "c"}


def test_embeddings_of_several_processes_equal_those_of_one(tmp_path):
    """20 scans in batches of 3 over 3 processes, one of which is interrupted: each batch once, in table order."""
    read, met = [], []

    def values(rows):
        return torch.tensor(rows)[:, None].float()

    def embed(rank, batches):
        def volumes(rows):
            if len(read) == batches:
                raise KeyboardInterrupt
            read.append(rows)
            return values(rows)

        shared = SimpleNamespace(
            num_processes=3, process_index=rank, is_main_process=rank == 0, wait_for_everyone=lambda: met.append(rank)
        )
        embed_parts(lambda x: x / 3, volumes, 20, 3, tmp_path, shared)

    with pytest.raises(KeyboardInterrupt):
        embed(2, batches=3)
    assert read[:2] == [[6, 7, 8], [15, 16, 17]], "its own batches come first"
    embed(0, batches=7)
    embed(1, batches=7)
    assert sorted(read) == [[*range(start, min(start + 3, 20))] for start in range(0, 20, 3)]
    assert met == [0, 1]
    alone = embed_rows(lambda x: x / 3, values, 20, 3)
    np.testing.assert_array_equal(embed_rows(lambda x: x / 0, values, 20, 3, tmp_path), alone)


def test_parts_of_other_weights_rows_or_batch_sizes_have_other_folders(tmp_path):
    key, path = {"weights": "a", "rows": "b"}, tmp_path / "embeddings.csv"
    folders = {parts_folder(path, key, 2), parts_folder(path, key, 3), parts_folder(path, {**key, "rows": "c"}, 2)}
    assert len(folders) == 3
    assert parts_folder(path, dict(reversed(key.items())), 2) in folders
