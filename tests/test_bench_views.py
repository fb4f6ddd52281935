"""Proves that views are compared by predictions of scans that the regression has not seen."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from ldae.bench.views import auc, main, predict, score, split_by_subject


def test_no_subject_is_in_training_and_test():
    subjects = np.repeat([f"s{i}" for i in range(12)], 3)
    tested = []
    for train, test in split_by_subject(subjects, 5, seed=0):
        assert not set(subjects[train]) & set(subjects[test])
        tested += test.tolist()
    assert sorted(tested) == list(range(36))


def test_a_linear_target_is_predicted_and_noise_is_not():
    generator = np.random.default_rng(0)
    x, subjects = generator.normal(size=(80, 200)), np.array([f"s{i}" for i in range(80)])
    x[:, 0] *= 20
    target = 60 + x[:, 0]
    kernel = x @ x.T
    assert np.abs(predict(kernel, target, subjects, 0) - target).mean() < 3
    noise = generator.normal(size=80)
    assert np.abs(predict(kernel, noise, subjects, 0)).max() < 0.7  # the penalty shrinks it to its mean
    value, low, high = score(x, np.sign(x[:, 0]), subjects)
    assert low <= value <= high
    assert value > 0.9


def test_auc_counts_ties_as_half():
    assert auc(np.array([True, True, False, False]), np.array([3.0, 1.0, 1.0, 0.0])) == pytest.approx(0.875)


def test_the_command_prints_a_line_for_each_view(tmp_path: Path):
    generator, rows = np.random.default_rng(0), []
    axes = np.meshgrid(*[np.arange(24) - 11.5] * 3, indexing="ij")
    for number in range(12):
        radius = np.sqrt(sum(axis**2 for axis in axes)) + generator.normal(0, 0.3, (24, 24, 24))
        inner = 4 + number / 6
        levels = np.select([radius < inner, radius < 8, radius < 11], [30, 100, 70], 0)
        data = np.where(levels > 0, levels + generator.normal(0, 3, levels.shape), 0).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.diag([2.0, 2, 2, 1])), tmp_path / f"{number}.nii.gz")
        rows.append([f"s{number}", "M000", f"{number}.nii.gz", "", 40 + number, "F" if number % 2 else "M"])
    table = tmp_path / "scans.csv"
    pd.DataFrame(rows, columns=["subject", "session", "path", "diagnosis", "age", "sex"]).to_csv(table, index=False)
    options = [str(table), "--spacing", "4", "--shape", "12,12,12", "--makers", "t1,partial_volume,ramps"]
    lines = CliRunner().invoke(main, options, catch_exceptions=False).output.splitlines()
    assert [line.split()[0] for line in lines] == ["t1", "partial_volume", "ramps"]
    assert all("age" in line and "sex" in line and "diagnosis" not in line for line in lines)
    assert float(lines[1].split("age ")[1].split()[0]) < 2.5  # years; always the mean: 4
    assert "one of" in CliRunner().invoke(main, [*options, "--makers", "atlas"]).output
