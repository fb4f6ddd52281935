"""Tests that the metrics equal scikit-learn's under any weights, and that intervals are over subjects."""

import numpy as np
import pytest
from sklearn import metrics as reference

from ldae.evaluation.probes import scores
from ldae.evaluation.probes.bootstrap import draw_subject_weights, percentile_interval, summarise


@pytest.fixture
def classified():
    """Truth, a noisy and partly tied probability, and random integer weights."""
    rng = np.random.default_rng(0)
    truth = (rng.random(80) < 0.4).astype(float)
    probability = np.clip(np.round(0.3 * truth + 0.7 * rng.random(80), 2), 0, 1)
    return truth, probability, rng.integers(0, 4, (5, 80)).astype(float)


def test_binary_scores_equal_scikit_learns_under_any_weights(classified):
    truth, probability, weights = classified
    found = scores.binary_scores(truth, probability, weights)
    predicted = probability >= 0.5
    for row, weight in enumerate(weights):
        expected = {
            "accuracy": reference.accuracy_score(truth, predicted, sample_weight=weight),
            "balanced_accuracy": reference.balanced_accuracy_score(truth, predicted, sample_weight=weight),
            "sensitivity": reference.recall_score(truth, predicted, sample_weight=weight),
            "specificity": reference.recall_score(truth, predicted, pos_label=0, sample_weight=weight),
            "f1": reference.f1_score(truth, predicted, sample_weight=weight),
            "mcc": reference.matthews_corrcoef(truth, predicted, sample_weight=weight),
            "auc": reference.roc_auc_score(truth, probability, sample_weight=weight),
            "pr_auc": reference.average_precision_score(truth, probability, sample_weight=weight),
            "brier": reference.brier_score_loss(truth, probability, sample_weight=weight),
        }
        for name, value in expected.items():
            assert found[name][row] == pytest.approx(value, abs=1e-12), name
        confusion = reference.confusion_matrix(truth, predicted, sample_weight=weight).ravel()
        assert [found[name][row] for name in ("tn", "fp", "fn", "tp")] == confusion.tolist()


def test_numeric_scores_equal_scikit_learns():
    rng = np.random.default_rng(1)
    truth = 70 + 10 * rng.standard_normal(60)
    guess = truth + rng.standard_normal(60)
    weights = rng.integers(0, 4, (4, 60)).astype(float)
    found = scores.numeric_scores(truth, guess, weights)
    for row, weight in enumerate(weights):
        assert found["mae"][row] == pytest.approx(reference.mean_absolute_error(truth, guess, sample_weight=weight))
        assert found["rmse"][row] ** 2 == pytest.approx(
            reference.mean_squared_error(truth, guess, sample_weight=weight)
        )
        assert found["r2"][row] == pytest.approx(reference.r2_score(truth, guess, sample_weight=weight))
        repeated = np.repeat(np.arange(60), weight.astype(int))
        assert found["pearson"][row] == pytest.approx(np.corrcoef(truth[repeated], guess[repeated])[0, 1])


def test_the_correlation_of_a_constant_is_undefined():
    truth = np.arange(10.0)
    assert np.isnan(scores.pearson(truth, np.full(10, 70.1), np.ones((1, 10)))[0])


def test_calibration_error_by_hand():
    """Two bins: 0.25 predicted and half observed; 0.95 predicted and always observed."""
    truth, probability = np.array([0, 1, 1, 1.0]), np.array([0.25, 0.25, 0.95, 0.95])
    found = scores.calibration_error(truth, probability, np.ones((1, 4)))
    assert found[0] == pytest.approx(0.5 * 0.25 + 0.5 * 0.05)


def test_age_adjustment_removes_the_effect_of_age():
    """Age separates the classes until pairs are matched by age; a score that depends on disease too still does."""
    rng = np.random.default_rng(2)
    truth = (rng.random(600) < 0.5).astype(float)
    age = 70 + 10 * truth + 8 * rng.standard_normal(600)
    unit = np.ones((1, 600))
    assert scores.auc(truth, age, unit)[0] > 0.75
    assert scores.age_adjusted_auc(truth, age, age, unit, window=1.0)[0] == pytest.approx(0.5, abs=0.05)
    assert scores.age_adjusted_auc(truth, age + 100 * truth, age, unit, window=1.0)[0] == 1
    assert np.isnan(scores.age_adjusted_auc(truth[:6], age[:6], age[:6], unit[:, :6], window=0.1)[0])


def test_scans_of_one_subject_are_drawn_together():
    subjects = ["a", "a", "b", "c", "c", "c"]
    weights = draw_subject_weights(subjects, 200, seed=3)
    assert (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 3] == weights[:, 5]).all()
    assert ((weights[1:, 0] + weights[1:, 2] + weights[1:, 3]) == 3).all()


def test_intervals_over_subjects_are_wider_than_over_scans():
    """Five identical scans of a subject are no more evidence than one."""
    rng = np.random.default_rng(4)
    truth = np.repeat((np.arange(40) < 20).astype(float), 5)
    score = np.repeat(truth[::5] + rng.standard_normal(40), 5)
    subjects = np.repeat([f"s{i}" for i in range(40)], 5)
    widths = {}
    for name, groups in {"subject": subjects, "scan": [str(i) for i in range(200)]}.items():
        low, high = percentile_interval(scores.auc(truth, score, draw_subject_weights(groups, 1000, 0))[1:])
        widths[name] = high - low
    assert widths["subject"] > 1.8 * widths["scan"]


def test_intervals_have_their_nominal_coverage():
    """95 % intervals of a mean, in 200 experiments of 50 subjects."""
    hits = 0
    for trial in range(200):
        values = np.random.default_rng(100 + trial).standard_normal(50)
        weights = draw_subject_weights([str(i) for i in range(50)], 300, trial)
        (_, _), (_, low), (_, high) = summarise("mean", weights @ values / weights.sum(1))
        hits += low <= 0 <= high
    assert 178 <= hits <= 199
