"""Proves that a forecast finds how y changes a year from noisy visits, that its intervals cover, and that it is stored.

The subjects are simulated: the first number of y rises by 0.1 a year, in AD by 0.5, and the second falls the faster the
larger it is; every visit adds noise to both.
"""

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from ldae.editing.covariates import Covariate
from ldae.editing.forecast_file import read_forecaster, write_forecaster
from ldae.editing.forecast_fit import find_pairs, fit_forecaster
from ldae.utils.errors import UserError

DIM = 8


def simulate(subjects, seed, noise=0.3, slow=1.0):
    """A table with visits at months 0 to 24, y (N, DIM), and true volumes that grow with the first number of y."""
    rng, rows, ys, volumes = np.random.default_rng(seed), [], [], []
    for subject in range(subjects):
        sick, start = subject % 2, rng.standard_normal(DIM)
        rate = np.zeros(DIM)
        rate[0], rate[1] = (0.5 if sick else 0.1), -0.3 * slow * start[1]
        for months in (0, 6, 12, 24)[: 2 + subject % 3]:
            years = months / 12
            rows.append((f"s{subject}", months, "AD" if sick else "CN", 70 + years + rng.normal()))
            true = start + years * rate
            ys.append(true + noise * rng.standard_normal(DIM) * (np.arange(DIM) < 4))
            volumes.append(30000 * np.exp(0.2 * true[0] + 0.01 * years * rng.standard_normal()))
    table = pd.DataFrame(rows, columns=["subject", "months", "diagnosis", "age"])
    return table, np.array(ys), np.array(volumes)


@pytest.fixture(scope="module")
def fitted():
    table, y, volumes = simulate(400, 0)
    return fit_forecaster(table, y, np.arange(len(table)), ["age", "diagnosis", "sex"], {"ventricle": volumes}, 0)


def change_of(forecaster, y, **known):
    return forecaster.change(np.array(y)[None], pd.DataFrame(known, index=[0]), np.ones(1))[0]


def test_pairs_are_all_earlier_and_later_visits_of_each_subject():
    table = pd.DataFrame({"subject": ["b", "a", "a", "a", "b"], "months": [0, 24, 0, 6, 0]})
    pairs = find_pairs(table, np.arange(5))
    assert sorted(zip(pairs.first, pairs.second, pairs.years, strict=True)) == [(2, 1, 2.0), (2, 3, 0.5), (3, 1, 1.5)]


def test_the_rate_depends_on_the_diagnosis_and_on_y(fitted):
    zero = np.zeros(DIM)
    assert change_of(fitted.forecaster, zero, diagnosis="AD")[0] == pytest.approx(0.5, abs=0.08)
    assert change_of(fitted.forecaster, zero, diagnosis="CN")[0] == pytest.approx(0.1, abs=0.08)
    assert change_of(fitted.forecaster, zero)[0] == pytest.approx(0.3, abs=0.05)  # the mean, if it is not known
    large = np.eye(DIM)[1] * 2
    difference = change_of(fitted.forecaster, large)[1] - change_of(fitted.forecaster, zero)[1]
    assert difference == pytest.approx(-0.6, abs=0.2)


def test_noise_of_the_first_visit_is_not_taken_for_a_change():
    """Nothing changes but by noise. Without the part A the second number would seem to fall where it is large."""
    table, y, _ = simulate(300, 1, noise=0.7, slow=0.0)
    found = fit_forecaster(table, y, np.arange(len(table)), ["diagnosis"], {}, 0).forecaster
    slopes = [change_of(found, 2 * np.eye(DIM)[k])[k] - change_of(found, np.zeros(DIM))[k] for k in (1, 2, 3)]
    assert np.abs(slopes).max() < 0.15  # the regression to the mean over a year is 2 * 0.33


def test_the_interval_of_a_volume_covers_new_subjects(fitted):
    table, y, volumes = simulate(400, 5)
    pairs = find_pairs(table, np.arange(len(table)))
    rows = table.iloc[pairs.first].reset_index(drop=True)
    features = fitted.forecaster.features(y[pairs.first], rows)
    ratio = fitted.forecaster.volumes["ventricle"].ratio(features, pairs.years)
    true = volumes[pairs.second] / volumes[pairs.first]
    assert 0.9 < np.mean((ratio[:, 1] <= true) & (true <= ratio[:, 2])) < 0.99
    assert np.abs(np.log(ratio[:, 0] / true)).mean() < 0.5 * np.abs(np.log(true)).mean()


def test_few_subjects_with_two_visits_are_refused():
    table, y, _ = simulate(9, 0)
    with pytest.raises(UserError, match="9 training subjects have two visits, a forecast needs 10"):
        fit_forecaster(table, y, np.arange(len(table)), [], {}, 0)


def test_draws_have_the_deviation_of_the_residuals(fitted):
    one = fitted.forecaster
    drawn = one.draw(2.0, 4000, seed=3)
    assert np.sqrt(np.mean((drawn @ one.basis / one.unit) ** 2)) == pytest.approx(float(one.spread(2.0)), rel=0.1)
    assert (one.draw(2.0, 3, seed=3) == one.draw(2.0, 3, seed=3)).all()


def test_a_forecaster_reads_back_as_it_was_written(fitted, tmp_path):
    path, one = tmp_path / "forecast.safetensors", fitted.forecaster
    write_forecaster(path, one, "hash")
    back = read_forecaster(path, "hash")
    table, y, _ = simulate(4, 9)
    years = np.full(len(table), 2.0)
    assert (back.change(y, table, years) == one.change(y, table, years)).all()
    features = one.features(y, table)
    assert (back.volumes["ventricle"].ratio(features, years) == one.volumes["ventricle"].ratio(features, years)).all()
    assert (vars(back.editor), back.years, back.pairs) == (vars(one.editor), one.years, one.pairs)
    with pytest.raises(UserError, match="another encoder"):
        read_forecaster(path, "other")
    save_file({"basis": torch.zeros(2, 2)}, path)
    with pytest.raises(UserError, match="is damaged"):
        read_forecaster(path, "hash")


def test_columns_as_numbers():
    number = Covariate.fit("age", pd.Series([60.0, 80.0, None]))
    assert number.encode(pd.Series(["80", ""])).tolist() == [[1.0], [0.0]]
    kind = Covariate.fit("diagnosis", pd.Series(["AD", "CN", "CN", "CN", ""]))
    assert kind.encode(pd.Series(["AD", "XX"])).tolist() == [[0.75, -0.75], [0.0, 0.0]]
    with pytest.raises(UserError, match="diagnosis=XX: this model knows AD, CN"):
        kind.parse("XX")
    with pytest.raises(UserError, match="age=old: give a number"):
        number.parse("old")
    assert Covariate.fit("site", pd.Series(["A", "A"])) is None
