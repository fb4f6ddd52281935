"""Proves that diagnosis is neither too easy nor too hard to predict, that volumes follow the reference values, and
that a subject depends on seed and number only."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ldae.data.phantom import draw_table
from ldae.data.phantom.subjects import AGE_RANGE, BRAIN, HIPPOCAMPUS, REFERENCE_AGES, VENTRICLE

VOLUMES = ["ventricle_mm3", "hippocampus_mm3", "brain_mm3"]


@pytest.fixture(scope="module")
def table():
    return draw_table(1000, seed=7).assign(male=lambda t: (t.sex == "M").astype(float))


@pytest.fixture(scope="module")
def baseline(table):
    return table[table.session == "ses-M000"]


def auc(table, columns):
    """Five-fold AUC for AD against CN of a logistic regression on these columns."""
    cases = table[table.diagnosis != "MCI"]
    model, truth = make_pipeline(StandardScaler(), LogisticRegression()), cases.diagnosis == "AD"
    return roc_auc_score(truth, cross_val_predict(model, cases[columns], truth, cv=5, method="predict_proba")[:, 1])


def test_diagnosis_is_neither_too_easy_nor_too_hard_to_predict(baseline):
    assert 0.55 <= auc(baseline, ["age", "male"]) <= 0.70
    assert auc(baseline, ["head_mm3"]) <= 0.60
    assert 0.85 <= auc(baseline, VOLUMES) <= 0.97
    assert 0.85 <= auc(baseline, [*VOLUMES, "head_mm3", "age", "male"]) <= 0.97
    # No single volume is enough.
    assert max(auc(baseline, [name]) for name in VOLUMES) < 0.92


def test_median_volumes_of_healthy_subjects_follow_the_reference(baseline):
    healthy = baseline[baseline.diagnosis == "CN"]
    for name, reference, tolerance in (
        ("ventricle_mm3", VENTRICLE, 0.15),
        ("hippocampus_mm3", HIPPOCAMPUS, 0.04),
        ("brain_mm3", BRAIN, 0.04),
    ):
        ratio = healthy[name] / np.interp(healthy.age, REFERENCE_AGES, reference)
        assert abs(np.log(ratio.median())) < tolerance / 2
        for low in (55, 65, 75):
            assert abs(np.log(ratio[healthy.age.between(low, low + 10)].median())) < tolerance, (name, low)


def test_variation_of_volumes_of_healthy_subjects_follows_the_reference(baseline):
    near = baseline[(baseline.diagnosis == "CN") & baseline.age.between(65, 75)]
    low, high = near.ventricle_mm3.quantile([0.05, 0.95])
    assert 11e3 < low < 19e3  # reference 14657
    assert 52e3 < high < 80e3  # reference 64966
    for sex, mean in (("M", 1500e3), ("F", 1345e3)):
        head = baseline.head_mm3[baseline.sex == sex]
        assert head.mean() == pytest.approx(mean, rel=0.02)
        assert 0.06 < head.std() / head.mean() < 0.085


def test_volumes_of_demented_subjects_differ_as_in_the_reference(baseline):
    sick, healthy = (baseline[baseline.diagnosis == name] for name in ("AD", "CN"))
    assert sick.hippocampus_mm3.mean() == pytest.approx(6183, rel=0.04)
    assert healthy.hippocampus_mm3.mean() == pytest.approx(7509, rel=0.04)
    ratio = sick.ventricle_mm3.median() / healthy.ventricle_mm3.median()
    assert ratio == pytest.approx(47400 / 26671, rel=0.15)
    share = [group.brain_mm3.sum() / group.head_mm3.sum() for group in (sick, healthy)]
    assert 0.01 < share[1] - share[0] < 0.05


def test_labels_and_sessions_are_in_their_ranges(table, baseline):
    shares = baseline.diagnosis.value_counts(normalize=True)
    assert shares.to_dict() == pytest.approx({"CN": 0.4, "MCI": 0.2, "AD": 0.4}, abs=0.05)
    assert baseline.age.between(*AGE_RANGE).all()
    assert table.age.between(55, 90).all()
    counts = table.groupby("subject").size()
    assert set(counts) == {1, 2, 3, 4}
    assert set(table.session) == {"ses-M000", "ses-M006", "ses-M012", "ses-M024"}
    assert set(table.scanner) == {"A", "B"}
    by_scanner = baseline.groupby("scanner").severity.mean()
    assert abs(by_scanner["A"] - by_scanner["B"]) < 0.1
    assert (table.groupby("subject")[["sex", "scanner", "head_mm3"]].nunique() == 1).all().all()


def test_a_subject_ages_from_session_to_session(table):
    first, last = table.groupby("subject").first(), table.groupby("subject").last()
    followed = first.session != last.session
    first, last = first[followed], last[followed]
    months = last.session.str.removeprefix("ses-M").astype(int)
    assert np.allclose(last.age - first.age, months / 12, atol=0.011)
    assert (last.ventricle_mm3 > first.ventricle_mm3).all()
    assert (last.hippocampus_mm3 < first.hippocampus_mm3).all()
    assert (last.brain_mm3 < first.brain_mm3).all()
    converted = (last.diagnosis != first.diagnosis).mean()
    assert 0 < converted < 0.15


def test_a_subject_depends_on_seed_and_number_only():
    few, many = draw_table(5, seed=3), draw_table(12, seed=3)
    assert few.equals(many.head(len(few)))
    assert not few.equals(draw_table(5, seed=4).head(len(few)))
