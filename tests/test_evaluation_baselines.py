"""Tests the baselines that y has to beat.

Principal components equal scikit-learn's and are fitted on nothing but the rows that may be seen, many scans are read
in batches, stored predictors of whole scans predict what fitted ones do, and seeds are averaged.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ldae.editing import frozen_probes
from ldae.editing.frozen_probes import read_frozen_probes
from ldae.evaluation.context import Context
from ldae.evaluation.html_report import write_report
from ldae.evaluation.probes import sources
from ldae.evaluation.probes.baselines import Features
from ldae.evaluation.probes.blocks import Block
from ldae.evaluation.probes.cross_validation import CrossValidation
from ldae.evaluation.probes.evaluator import ExternalCohort, Probes
from ldae.evaluation.probes.principal_components import ExactComponents, LeadingComponents, ScanMatrix
from ldae.evaluation.probes.seeds import Seeds
from ldae.evaluation.probes.solvers import logistic_path, ridge_path
from ldae.evaluation.probes.targets import Regression
from ldae.models.components_encoder import ComponentsEncoder
from ldae.utils.errors import UserError
from ldae.utils.files import write_json

AGE = {"age": Regression("age")}


def cohort(out, subjects=60, seed=0, views=None):
    """One scan per subject. Age changes the view along one pattern, and y along one that the view does not have."""
    rng = np.random.default_rng(seed)
    age = rng.uniform(20, 80, subjects)
    table = pd.DataFrame({
        "subject": [f"sub-{n:03d}" for n in range(subjects)], "session": "ses-M000", "months": 0, "age": age,
        "path": [f"{n}.nii" for n in range(subjects)], "split": np.where(np.arange(subjects) < 45, "train", "test"),
        "head_mm3": 1.4e6 + 1e4 * age + 1e4 * rng.standard_normal(subjects),
    })  # fmt: skip
    pattern = np.random.default_rng(9).standard_normal((2, 6, 6, 6))
    views = rng.random((subjects, 2, 6, 6, 6)) + 0.004 * (age - 50)[:, None, None, None, None] * pattern
    y = rng.standard_normal((subjects, 16)).astype(np.float32)
    y[:, 0] += 0.05 * (age - 50)
    volumes, maps = torch.rand(subjects, 1, 6, 6, 6), torch.from_numpy(views.astype(np.float32))
    return Context(
        model=None, table=table, volumes=lambda r: volumes[list(r)], posterior=lambda r: (volumes[list(r)],) * 2,
        embeddings=y, untrained=lambda draw: y[:, 2:], out=out, spacing=(4.0,) * 3, weights="abc", untrained_draws=1,
        seen=lambda r: maps[list(r)],
    )  # fmt: skip


def matrix(scans):
    return ScanMatrix(lambda rows: scans[list(rows)].astype(np.float32), len(scans))


@pytest.mark.parametrize("kept", [True, False])
def test_components_equal_those_of_scikit_learn_wherever_the_scans_are(kept, monkeypatch):
    from sklearn.decomposition import PCA

    if not kept:
        monkeypatch.setattr("ldae.evaluation.probes.principal_components.MAX_KEPT", 0)
        monkeypatch.setattr("ldae.evaluation.probes.principal_components.MAX_BATCH", 8 * 50 * 7)  # seven scans
    scans = (5 + np.random.default_rng(0).standard_normal((40, 50)) * np.linspace(0.1, 3, 50)).astype(np.float32)
    rows, others = np.arange(0, 40, 2), np.arange(1, 40, 2)
    found = ExactComponents(matrix(scans), rows)
    pca = PCA().fit(scans[rows].astype(np.float64))
    assert found.count == 19  # one is lost with the mean
    for chosen in (rows, others):
        expected = pca.transform(scans[chosen].astype(np.float64))[:, :19]
        np.testing.assert_allclose(np.abs(found.scores(chosen)), np.abs(expected), atol=1e-6)
    slopes = np.random.default_rng(1).standard_normal(19)
    mean, vector = found.unfold(slopes)
    np.testing.assert_allclose((scans[others] - mean) @ vector, found.scores(others) @ slopes, atol=1e-6)


def test_the_leading_components_of_many_scans_equal_exact_ones():
    scans = (np.random.default_rng(0).standard_normal((200, 60)) * np.logspace(0, -2, 60)).astype(np.float32)
    rows, others = np.arange(150), np.arange(150, 200)
    exact, leading = ExactComponents(matrix(scans), rows), LeadingComponents(matrix(scans), rows, 5, 0)
    assert leading.count == 5
    np.testing.assert_allclose(np.abs(leading.scores(others)), np.abs(exact.scores(others)[:, :5]), atol=1e-3)
    slopes = np.arange(5.0)
    mean, vector = leading.unfold(slopes)
    np.testing.assert_allclose((scans[others] - mean) @ vector, leading.scores(others) @ slopes, atol=1e-5)


def test_solvers_equal_scikit_learn():
    from sklearn.linear_model import LogisticRegression, Ridge

    rng = np.random.default_rng(2)
    x = rng.standard_normal((80, 12)) * np.logspace(1, -1, 12)
    number = x @ rng.standard_normal(12) + rng.standard_normal(80)
    truth, weights = (number > 1).astype(float), rng.random(80) + 0.5
    for strength, (slopes, intercept) in zip([100.0, 0.1], ridge_path(x, number, [100.0, 0.1]), strict=True):
        expected = Ridge(strength).fit(x, number)
        np.testing.assert_allclose(slopes, expected.coef_, atol=1e-9)
        assert intercept == pytest.approx(expected.intercept_)
    strengths = [1e-4, 1e-2, 1.0, 100.0]
    for strength, (slopes, intercept) in zip(strengths, logistic_path(x, truth, strengths, weights), strict=True):
        expected = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(x, truth, weights)
        np.testing.assert_allclose(slopes, expected.coef_[0], atol=1e-4)
        assert intercept == pytest.approx(expected.intercept_[0], abs=1e-4)


def test_what_the_view_and_y_tell_together_is_compared_with_the_view_alone(tmp_path):
    names = ["pca_view", "pca_images", "pca_view_and_y"]
    metrics = dict(Probes(AGE, names, resamples=50, pca_widths=[8])(cohort(tmp_path)))
    errors = {name: metrics[f"baseline/{name}/age/mae"] for name in names}
    assert errors["pca_view_and_y"] < errors["pca_view"] < errors["pca_images"]
    gain = metrics["baseline/pca_view_and_y/age/mae_gain"]
    assert gain == pytest.approx(errors["pca_view"] - errors["pca_view_and_y"])
    assert metrics["baseline/pca_view_and_y/age/mae_gain_low"] < gain
    difference = metrics["baseline/pca_view_and_y/age/mae_difference"]
    assert difference == pytest.approx(errors["pca_view_and_y"] - metrics["probe/age/mae"])


@pytest.mark.parametrize("regime", ["transductive", "inductive"])
def test_components_are_fitted_on_what_the_encoder_saw_and_otherwise_on_each_fold(tmp_path, regime):
    context = cohort(tmp_path)
    context.table.loc[:4, "split"] = "val"
    if regime == "inductive":
        context.table["split"] = "test"
    fits = []
    original = sources.ExactComponents

    class Watched(original):
        def __init__(self, matrix, rows):
            fits.append(len(rows))
            super().__init__(matrix, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "ExactComponents", Watched)
        evaluator = CrossValidation(AGE, regime, ["pca_view"], repeats=1, resamples=5, pca_widths=[4])
        metrics = dict(evaluator(context))
    assert fits == ([40] if regime == "transductive" else [48] * 5)
    assert f"cv/{regime}/baseline/pca_view/age/mae_difference" in metrics


@pytest.mark.parametrize("most", [2048, 10])
def test_the_scans_of_the_test_split_change_no_stored_predictor(tmp_path, monkeypatch, most):
    """With exact components, and with those of many scans."""
    monkeypatch.setattr(sources, "MAX_EXACT", most)
    stored = []
    for poison in (0.0, 7.0):
        context = cohort(tmp_path)
        maps = context.views(range(60)).clone()
        maps[context.rows("test")] *= 1 + poison
        poisoned = replace(context, seen=lambda r, m=maps: m[list(r)])
        list(Probes(AGE, ["pca_view"], resamples=5, pca_widths=[4])(poisoned))
        stored.append(read_frozen_probes(tmp_path / "probes.json")["age"]["pca_view"].model)
    np.testing.assert_allclose(stored[1].coef, stored[0].coef, rtol=1e-9)
    assert stored[1].intercept == pytest.approx(stored[0].intercept, rel=1e-9)


@pytest.mark.parametrize("inline", [100, 10_000])
def test_stored_predictors_of_whole_scans_predict_what_fitted_ones_do(tmp_path, monkeypatch, inline):
    monkeypatch.setattr(frozen_probes, "INLINE", inline)
    context = cohort(tmp_path)
    names = ["mean", "pca_view", "pca", "pca_view_and_y", "untrained"]
    list(Probes(AGE, names, resamples=5, pca_widths=[4, 8])(context))
    assert (tmp_path / "probes_scans.npz").exists() == (inline == 100)
    fitted = pd.read_csv(tmp_path / "age_predictions.csv")
    out = tmp_path / "other"
    out.mkdir()
    list(ExternalCohort(tmp_path / "probes.json", resamples=5)(replace(context, out=out)))
    applied = pd.read_csv(out / "external_age_predictions.csv").iloc[context.rows("test")]
    for name in ("embedding", "mean", "pca_view", "pca", "pca_view_and_y", "untrained_0"):
        np.testing.assert_allclose(applied[name], fitted[name], rtol=1e-6)


def test_predictors_of_whole_scans_are_left_out_without_their_file_and_refused_with_another(tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_probes, "INLINE", 100)
    context = cohort(tmp_path)
    list(Probes(AGE, ["pca_view", "mean"], resamples=5, pca_widths=[4])(context))
    file = tmp_path / "probes_scans.npz"
    content = file.read_bytes()
    file.unlink()
    assert set(read_frozen_probes(tmp_path / "probes.json", with_scans=True)["age"]) == {"embedding", "mean"}
    file.write_bytes(content + b"x")
    with pytest.raises(UserError, match=r"evaluation=\[probes\]"):
        read_frozen_probes(tmp_path / "probes.json", with_scans=True)
    assert set(read_frozen_probes(tmp_path / "probes.json")["age"]) == {"embedding", "mean"}


def test_baselines_stored_under_former_names_are_applied(tmp_path):
    context = cohort(tmp_path)
    list(Probes(AGE, ["pca_images"], resamples=5, pca_widths=[4])(context))
    text = (tmp_path / "probes.json").read_text().replace('"pca_images"', '"images"')
    (tmp_path / "probes.json").write_text(text)
    metrics = dict(ExternalCohort(tmp_path / "probes.json", resamples=5)(context))
    assert "external/baseline/pca_images/age/mae" in metrics


def test_the_head_goes_to_all_predictors_or_to_none(tmp_path):
    """In this cohort it tells age."""
    context = cohort(tmp_path)
    names = ["mean", "pca_images", "untrained"]
    without = dict(Probes(AGE, names, resamples=5, pca_widths=[4])(context))
    with_head = dict(Probes(AGE, names, resamples=5, pca_widths=[4], head_size=True)(replace(context, skipped=[])))
    for stem in ("probe", "baseline/pca_images", "baseline/untrained"):
        assert with_head[f"{stem}/age/mae"] < 0.6 * without[f"{stem}/age/mae"]
    assert with_head["baseline/mean/age/mae"] == without["baseline/mean/age/mae"]
    assert len(read_frozen_probes(tmp_path / "probes.json")["age"]["embedding"].model.mean) == 16  # of y alone
    with pytest.raises(UserError, match="head_mm3"):
        Features(replace(context, table=context.table.drop(columns="head_mm3")), head_size=True)


def test_the_parts_of_an_encoder_that_starts_from_components_have_rows(tmp_path):
    class Residual(nn.Module):
        dim = 3

    torch.manual_seed(0)
    encoder = ComponentsEncoder([2, 6, 6, 6], components=4, dim=16, residual=Residual(), residual_share=0.5)
    context = cohort(tmp_path)
    age = torch.from_numpy(context.table["age"].to_numpy(np.float32))
    parts = torch.randn(60, 7)
    parts[:, 0] += 0.3 * (age - 50)  # age is in the components only
    context.embeddings = (parts @ encoder.rotation.T).numpy()
    context.model = SimpleNamespace(encoder=encoder, device=torch.device("cpu"))
    metrics = dict(Probes(AGE, ["mean", "components", "residual"], resamples=5)(context))
    assert metrics["baseline/components/age/mae"] < 1.2 * metrics["probe/age/mae"]
    assert metrics["baseline/residual/age/mae"] > 0.9 * metrics["baseline/mean/age/mae"]
    assert metrics["baseline/residual/age/mae_difference"] > 5
    context.model.encoder.residual = None
    assert Features(context).select_applicable(["components", "mean"], "age", np.arange(9)) == ["mean"]
    assert not context.skipped  # an encoder without parts is no failure


def test_seeds_are_averaged_with_an_interval_over_subjects_and_their_range(tmp_path):
    runs = [tmp_path / f"ixi_s{seed}" for seed in range(3)]
    evaluator = CrossValidation(AGE, "transductive", ["mean", "pca_view"], repeats=2, resamples=5, pca_widths=[4])
    for seed, run in enumerate(runs):
        out = run / "evaluation"
        out.mkdir(parents=True)
        context = cohort(out)
        noise = np.random.default_rng(seed).standard_normal(context.embeddings.shape).astype(np.float32)
        metrics = dict(evaluator(replace(context, embeddings=context.embeddings + noise)))
        write_json(out / "metrics.json", {**metrics, "semantics/z0_error_ratio": 1.0 + seed})
    context = cohort(tmp_path)
    found = dict(Seeds(AGE, runs, resamples=200)(context))
    errors = [pd.read_csv(run / "evaluation/cv_transductive_age_predictions.csv") for run in runs]
    errors = [(table["embedding"] - table["truth"]).abs().mean() for table in errors]
    stem = "seeds/cv/transductive/probe/age/mae"
    assert found[stem] == pytest.approx(np.mean(errors))
    assert (found[f"{stem}_lowest"], found[f"{stem}_highest"]) == pytest.approx((min(errors), max(errors)))
    assert found[f"{stem}_low"] < found[stem] < found[f"{stem}_high"]
    assert found["seeds/cv/transductive/baseline/pca_view/age/mae_difference_low"] < 0
    assert found["seeds/semantics/z0_error_ratio"] == 2
    assert found["seeds/runs"] == 3
    with pytest.raises(UserError, match="two different runs"):
        dict(Seeds(AGE, runs[:1])(context))
    with pytest.raises(UserError, match="no results"):
        dict(Seeds(AGE, [runs[0], tmp_path / "none"])(context))
    file = runs[1] / "evaluation/cv_transductive_age_predictions.csv"
    pd.read_csv(file).iloc[1:].to_csv(file, index=False)
    with pytest.raises(UserError, match="different scans"):
        dict(Seeds(AGE, runs)(context))


def test_the_components_that_y_starts_from_predict_what_a_rotation_of_them_does():
    """Also where a fold has fewer scans than there are components: y and its components are the same model."""
    rng = np.random.default_rng(6)
    scores = rng.standard_normal((60, 50)) * np.logspace(0, -1, 50)
    y = 3 * scores @ np.linalg.qr(rng.standard_normal((80, 80)))[0][:50]
    truth, subjects = 50 + 10 * scores[:, 0] + rng.standard_normal(60), np.arange(60).astype(str)
    of_components = AGE["age"].fit([Block(scores, [50], are_components=True)], truth, subjects, 0)
    of_y = AGE["age"].fit(y, truth, subjects, 0)
    np.testing.assert_allclose(of_y.predict(y), of_components.predict(scores), rtol=1e-9)


def test_the_report_says_in_words_where_y_is_worse(tmp_path):
    metrics = {
        "cv/transductive/probe/age/mae": 7.5, "cv/transductive/probe/age/mae_low": 7.0,
        "cv/transductive/probe/age/mae_high": 8.0,
    }  # fmt: skip
    for name, value, ends in (("pca_view", 7.0, (-0.9, -0.1)), ("volumes", 7.4, (-0.4, 0.2)), ("pca", 8, (0.2, 0.9))):
        stem = f"cv/transductive/baseline/{name}/age/mae"
        found = {"": value, "_difference": value - 7.5, "_difference_low": ends[0], "_difference_high": ends[1]}
        metrics |= {f"{stem}{end}": number for end, number in found.items()}
    text = write_report(tmp_path, "x", metrics).read_text()
    assert "age: mean absolute error, years" in text
    assert "<td>PCA of the encoder&#x27;s view</td><td>7</td><td>y is worse by 0.5 [0.1, 0.9]</td>" in text
    assert "<td>region volumes</td><td>7.4</td><td>no difference is shown: -0.1 [-0.4, 0.2]</td>" in text
    assert "<td>PCA of latents</td><td>8</td><td>y is better by 0.5 [0.2, 0.9]</td>" in text
    assert text.index("encoder&#x27;s view</td>") < text.index("<td>y</td>") < text.index("<td>PCA of latents</td>")
