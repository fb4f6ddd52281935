"""Tests cross-validation.

The two regimes are kept apart, all predictors get the same folds, no probe sees a held-out label, and the folds of
several runs are scored together; region volumes are relative to the head, and brain age is corrected for regression to
the mean.
"""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from ldae.data.splits import plan_split, subjects_of_fold
from ldae.editing.linear_model import LinearModel
from ldae.evaluation.context import Context
from ldae.evaluation.html_report import write_report
from ldae.evaluation.probes.baselines import downsample
from ldae.evaluation.probes.cross_validation import CrossValidation, PooledFolds
from ldae.evaluation.probes.evaluator import Probes
from ldae.evaluation.probes.fitting import fit
from ldae.evaluation.probes.table_features import find_columns, read_columns
from ldae.evaluation.probes.targets import Classification, Regression
from ldae.utils.errors import UserError
from ldae.utils.files import write_json
from ldae.utils.results_record import Results, Source, write_record

SEX = Classification("sex", positive="F", negative="M")


def cohort(out, subjects=90, seed=0):
    """One scan per subject. y contains sex and age with noise; men have larger heads, ventricles grow with age."""
    rng = np.random.default_rng(seed)
    age, male = rng.uniform(20, 80, subjects), rng.integers(0, 2, subjects)
    head = 1.4e6 + 1.5e5 * male + 5e4 * rng.standard_normal(subjects)
    table = pd.DataFrame({
        "subject": [f"sub-{n:03d}" for n in range(subjects)], "session": "ses-M000", "months": 0,
        "path": [f"{n}.nii" for n in range(subjects)], "diagnosis": "", "age": age, "sex": np.where(male, "M", "F"),
        "split": np.where(np.arange(subjects) < 0.8 * subjects, "train", "test"),
        "ventricle_mm3": head * (0.005 + 2e-4 * (age - 20)), "label_007_mm3": 1000.0, "head_mm3": head,
    })  # fmt: skip
    y = rng.standard_normal((subjects, 16)).astype(np.float32)
    y[:, 0] += 0.08 * (age - 50)
    y[:, 1] += 2 * male
    latents = torch.from_numpy(rng.standard_normal((subjects, 2, 3, 3, 3)).astype(np.float32))
    volumes = torch.from_numpy(rng.random((subjects, 1, 8, 8, 8)).astype(np.float32))
    return Context(
        model=None, table=table, volumes=lambda r: volumes[list(r)], posterior=lambda r: (latents[r], latents[r]),
        embeddings=y, untrained=lambda draw: np.roll(y[:, 2:], draw, axis=0), out=out, spacing=(2.0,) * 3,
        weights="abc", untrained_draws=2,
    )  # fmt: skip


def evaluator(regime="transductive", **options):
    tasks = {"age": Regression("age", bias_correction=True), "sex": SEX}
    return CrossValidation(tasks, regime, **{"repeats": 2, "resamples": 100, "pca_widths": [4, 8], **options})


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    context = cohort(tmp_path_factory.mktemp("evaluation"))
    return context, dict(evaluator()(context))


def test_the_regime_is_in_every_name_and_chooses_the_scans(judged, tmp_path):
    context, metrics = judged
    assert all(name.startswith("cv/transductive/") for name in metrics)
    assert metrics["cv/transductive/probe/age/scans"] == 72
    other = replace(context, out=tmp_path)
    inductive = dict(evaluator("inductive", repeats=1)(other))
    assert all(name.startswith("cv/inductive/") for name in inductive)
    assert inductive["cv/inductive/probe/age/scans"] == 18
    seen, unseen = (
        set(pd.read_csv(folder / f"cv_{regime}_age_predictions.csv")["subject"])
        for folder, regime in ((context.out, "transductive"), (tmp_path, "inductive"))
    )
    assert not seen & unseen
    with pytest.raises(UserError, match="regime"):
        evaluator("both")
    with pytest.raises(UserError, match="nearest"):
        evaluator(baselines=["nearest"])


def test_the_report_names_the_regime(judged, tmp_path):
    text = write_report(tmp_path, "x", judged[1]).read_text()
    assert "saw, without labels" in text
    assert "never saw" not in text


def test_all_predictors_are_scored_in_the_same_folds_with_paired_differences(judged):
    context, metrics = judged
    found = pd.read_csv(context.out / "cv_transductive_age_predictions.csv")
    assert found.groupby("repeat")["subject"].nunique().tolist() == [72, 72]
    assert (
        not found[["embedding", "mean", "pca", "pca_images", "pca_view", "untrained_0", "untrained_1", "volumes"]]
        .isna()
        .any()
        .any()
    )
    stem = "cv/transductive/baseline/mean/age/mae_difference"
    gap = metrics["cv/transductive/baseline/mean/age/mae"] - metrics["cv/transductive/probe/age/mae"]
    assert metrics[stem] == pytest.approx(gap)
    assert metrics[f"{stem}_low"] > 0
    errors = (found["embedding"] - found["truth"]).abs().groupby(found["repeat"]).mean()
    assert metrics["cv/transductive/probe/age/mae"] == pytest.approx(errors.mean())
    assert metrics["cv/transductive/probe/sex/auc"] > 0.8
    assert metrics["cv/transductive/baseline/mean/sex/auc"] < 0.6


def test_the_constant_predictor_of_a_fold_is_the_mean_of_the_other_folds(judged):
    """The constant predictor shows which labels were used: not those of its own fold."""
    context, _ = judged
    found = pd.read_csv(context.out / "cv_transductive_age_predictions.csv")
    first = found[found["repeat"] == 0]
    for _, fold in first.groupby("mean"):
        others = first[~first["subject"].isin(fold["subject"])]
        assert fold["mean"].iloc[0] == pytest.approx(others["truth"].mean())


def test_volumes_are_relative_to_the_head_whose_size_is_another_predictor(tmp_path):
    table = cohort(tmp_path).table
    columns = find_columns(table, "volumes")
    assert columns == ["label_007_mm3/head_mm3", "ventricle_mm3/head_mm3"]
    assert read_columns(table, columns)[:, 1] == pytest.approx(table["ventricle_mm3"] / table["head_mm3"])
    with_head = find_columns(table.assign(affine_determinant=1.1), "volumes_head")
    assert with_head == [*columns, "head_mm3", "affine_determinant"]
    assert read_columns(table, with_head)[:, 2] == pytest.approx(table["head_mm3"])
    bare = table.drop(columns="head_mm3")
    assert read_columns(bare, find_columns(bare, "volumes"))[:, 1] == pytest.approx(table["ventricle_mm3"])
    assert find_columns(bare, "volumes_head") == []
    bare = table.drop(columns=["ventricle_mm3", "label_007_mm3"])
    assert find_columns(bare, "volumes") == find_columns(bare, "volumes_head") == []  # the head alone is not a region


def test_stored_predictors_of_an_earlier_version_read_the_same_numbers(tmp_path):
    """They named the head's volume beside the regions that were divided by it."""
    table = cohort(tmp_path).table
    values = read_columns(table, ["label_007_mm3", "ventricle_mm3", "head_mm3"])
    assert values[:, 1] == pytest.approx(table["ventricle_mm3"] / table["head_mm3"])
    assert values[:, 2] == pytest.approx(table["head_mm3"])
    assert read_columns(table, ["ventricle_mm3"])[:, 0] == pytest.approx(table["ventricle_mm3"])


def test_images_are_averaged_to_about_four_millimetres(tmp_path):
    context = cohort(tmp_path, subjects=12)
    expected = context.volumes([3]).reshape(4, 2, 4, 2, 4, 2).mean((1, 3, 5))
    found = downsample(context, [2, 3])
    assert found.shape == (2, 1, 4, 4, 4)
    assert found[1, 0] == pytest.approx(expected, abs=1e-6)


def test_bias_correction_removes_the_correlation_of_error_and_age(judged):
    _, metrics = judged
    stem = "cv/transductive/probe/age/"
    assert metrics[stem + "gap_pearson"] < -0.4
    assert abs(metrics[stem + "unbiased_gap_pearson"]) < 0.3
    assert stem + "unbiased_mae" in metrics
    assert not any("unbiased" in name for name in metrics if "/sex/" in name)


def test_the_bias_is_stored_and_does_not_change_predictions():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 5))
    truth = 50 + 5 * x[:, 0] + 8 * rng.standard_normal(60)
    subjects = np.arange(60).astype(str)
    plain, corrected = (fit(Regression("age", bias_correction=b), x, truth, subjects, 0) for b in (False, True))
    assert plain.bias is None
    assert corrected.predict(x) == pytest.approx(plain.predict(x))
    again = LinearModel.from_dict(corrected.to_dict())
    assert again.bias == corrected.bias
    intercept, slope = corrected.bias
    assert 0 < slope < 1
    assert again.unbiased(plain.predict(x)) == pytest.approx((plain.predict(x) - intercept) / slope)


def test_folds_are_disjoint_cover_all_subjects_and_are_stored(tmp_path):
    table = cohort(tmp_path).table.drop(columns="split")
    shares = {"train": 0.92, "val": 0.08, "test": 0.0}
    tests = []
    for fold in range(5):
        path = tmp_path / f"{fold}.csv"
        split = plan_split(table, path, shares, 0, (fold, 5))
        split.store()
        found = dict(split.of_subject)
        tests.append({subject for subject, split in found.items() if split == "test"})
        assert {"train", "val"} <= set(found.values())
        assert plan_split(table, path, shares, 0, (fold, 5)).of_subject == found
    assert [len(part) for part in tests] == [18] * 5
    assert set.union(*tests) == set(table["subject"])
    assert subjects_of_fold(table.sample(frac=1, random_state=1), 2, 5, 0) == tests[2]
    with pytest.raises(UserError, match=r"data\.split\.fold=5"):
        subjects_of_fold(table, 5, 5, 0)


def copy_with_split_seed(run, seed):
    """A run with the same predictions, whose folds were drawn with another seed."""
    other = run.with_name(f"{run.name}_{seed}")
    shutil.copytree(run, other)
    write_json(other / "repr/config.yaml", {"model": {}, "data": {"split": {"seed": seed}}})
    return other


def test_the_test_folds_of_several_runs_are_scored_together(tmp_path):
    context = cohort(tmp_path / "out")
    context.out.mkdir()
    tasks = {"age": Regression("age", bias_correction=True)}
    for fold in range(3):
        held = subjects_of_fold(context.table, fold, 3, 0)
        split = np.where(context.table["subject"].isin(held), "test", "train")
        out = tmp_path / f"run{fold}" / "evaluation"
        out.mkdir(parents=True)
        run = replace(context, table=context.table.assign(split=split), out=out)
        list(Probes(tasks, resamples=20, pca_widths=[4])(run))
    runs = [tmp_path / f"run{fold}" for fold in range(3)]
    metrics = dict(PooledFolds(tasks, runs, resamples=50)(context))
    assert metrics["cv/inductive/probe/age/scans"] == len(context.table)
    assert metrics["cv/inductive/baseline/mean/age/mae_difference_low"] > 0
    assert abs(metrics["cv/inductive/probe/age/unbiased_gap_pearson"]) < 0.3
    with pytest.raises(UserError, match="two runs"):
        dict(PooledFolds(tasks, [runs[0], runs[0]])(context))
    again = [copy_with_split_seed(run, 1) for run in runs]
    both = dict(PooledFolds(tasks, [*runs, *again], resamples=50)(context))
    assert both["cv/inductive/probe/age/repeats"] == 2
    assert both["cv/inductive/probe/age/mae"] == pytest.approx(metrics["cv/inductive/probe/age/mae"])
    with pytest.raises(UserError, match=r"no test fold of some data\.split\.seed"):
        dict(PooledFolds(tasks, [*runs, *again[:2]])(context))
    source = Source(weights={"encoder": "of then"})
    write_record(runs[1] / "evaluation", {"probes": Results(source, [], [], [])})
    assert dict(PooledFolds(tasks, runs, resamples=5)(context))["cv/inductive/probe/age/scans"] == len(context.table)
    write_json(runs[1] / "repr/weights/metadata.json", {"weights": {"encoder": {"sha256": "of now"}}})
    with pytest.raises(UserError, match="other weights"):
        dict(PooledFolds(tasks, runs)(context))
    with pytest.raises(UserError, match=r"evaluation=\[probes\]"):
        dict(PooledFolds(tasks, [tmp_path / "none"])(context))
