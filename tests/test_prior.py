"""Tests the semantic prior on made-up y: whitening, its Gaussian and its network, labels and draws."""

import json

import pytest
import torch

from ldae.prior.columns import find_columns, parse_conditions, read_columns
from ldae.prior.draws import draw_semantics
from ldae.prior.whitening import Whitening
from ldae.utils.errors import UserError
from ldae.utils.seeding import make_generator
from small_prior import PEOPLE, fitted, made_up_people, made_up_table


@pytest.fixture(scope="module")
def data():
    return made_up_people()


def label(**values):
    """Labels (1, 3); NaN where none is given."""
    order = {"diagnosis": 0, "age": 1, "sex": 2}
    found = torch.full((1, 3), torch.nan)
    for name, value in values.items():
        found[0, order[name]] = value
    return found


def test_whitened_training_scans_have_variance_one_in_the_subspace_that_they_have(data):
    y = data[2]
    whitening = Whitening(12, 6)
    assert whitening.fit(y, torch.full((PEOPLE,), 1 / PEOPLE)) == pytest.approx(1, abs=1e-6)
    u = whitening.whiten(y)
    assert whitening.exists.tolist() == [1, 1, 1, 1, 0, 0]
    torch.testing.assert_close(u[:, :4].T.cov(), torch.eye(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(whitening.unwhiten(u), y, atol=1e-4, rtol=0)


def test_every_subject_counts_alike(data):
    y = data[2][:20]
    once, repeated = Whitening(12, 6), Whitening(12, 6)
    once.fit(y, torch.full((20,), 1 / 20))
    scans = torch.cat([y, y[:1].expand(4, -1)])  # the first subject has five scans
    repeated.fit(scans, torch.tensor([0.01] + [0.05] * 19 + [0.01] * 4))
    torch.testing.assert_close(once.mean, repeated.mean)


def test_the_gaussian_follows_labels_and_is_standard_without_them(data):
    prior = fitted(data)
    y, table = data[2], data[3]
    noise = torch.randn(4000, 6, generator=make_generator(1, "noise"))
    expected = y[(table["diagnosis"] == "AD").to_numpy()].mean(0)
    age = float(table["age"][table["diagnosis"] == "AD"].mean())
    drawn = prior.draw(noise, label(diagnosis=0, age=age, sex=0).expand(4000, -1)).mean(0)
    assert float((drawn - expected).norm() / (y.mean(0) - expected).norm()) < 0.15
    free = prior.draw(noise, label().expand(4000, -1))
    torch.testing.assert_close(free.T.cov(), y.T.cov(), atol=0.35, rtol=0.05)


def test_before_training_the_network_changes_nothing(data):
    """The sampler with the exact prediction for a Gaussian draws what the Gaussian itself draws."""
    prior = fitted(data, hidden=2, width=16)
    noise, labels = torch.randn(64, 6), label(diagnosis=1, age=70).expand(64, -1)
    difference = prior.draw(noise, labels) - prior.draw(noise, labels, gaussian=True)
    assert float(difference.std()) < 0.005 * float(prior.draw(noise, labels).std())


def test_the_network_learns_what_is_not_gaussian(data):
    """The third direction has two modes, between which a Gaussian has most of its draws."""
    prior = fitted(data, hidden=2, width=64, dropout=0.0)
    _, labels, y, _ = data
    optimizer = torch.optim.Adam(prior.network.parameters(), 3e-3)
    for _ in range(250):
        t = torch.randint(0, 1000, (PEOPLE,))
        u, noise = prior.whitening.whiten(y), torch.randn(PEOPLE, 6)
        alpha, sigma = (f(t).float()[:, None] for f in (prior.schedule.alpha, prior.schedule.sigma))
        error = prior(alpha * u + sigma * noise, t, labels) - (alpha * noise - sigma * u)
        optimizer.zero_grad()
        error[:, :4].square().mean().backward()
        optimizer.step()
    noise, free = torch.randn(500, 6), label().expand(500, -1)
    axis = torch.linalg.pinv(torch.randn(4, 12, generator=make_generator(0, "axes")))[:, 2]

    def between(drawn):
        return float(((drawn - 5) @ axis).abs().lt(0.5).float().mean())

    assert between(y) < 0.02
    assert between(prior.draw(noise, free)) < 0.5 * between(prior.draw(noise, free, gaussian=True))


def test_labels_that_are_not_asked_for_follow_those_that_are(data):
    prior, table = fitted(data), data[3]
    drawn = draw_semantics(prior, range(600), 0).table
    shares = (drawn["diagnosis"].value_counts() - 2 * table["diagnosis"].value_counts()) / 600
    assert shares.abs().max() < 0.06
    for name in ("AD", "CN"):
        ages = [float(t["age"][t["diagnosis"] == name].mean()) for t in (drawn, table)]
        assert ages[0] == pytest.approx(ages[1], abs=1.5)
    old = draw_semantics(prior, range(300), 0, {"age": "80"}).table
    assert (old["diagnosis"] == "AD").mean() > (table["diagnosis"] == "AD").mean() + 0.3
    assert set(old["age"]) == {80.0}
    assert drawn["age"].between(table["age"].min(), table["age"].max()).all()


@pytest.mark.parametrize("options", [{}, {"hidden": 2, "width": 16}], ids=["gaussian", "diffusion"])
def test_a_draw_depends_on_seed_number_and_condition_alone(data, options):
    prior = fitted(data, **options)
    many, one = (draw_semantics(prior, keys, 3, {"diagnosis": "AD"}) for keys in (range(5), [4]))
    assert torch.equal(many.y[4:], one.y)
    assert many.table.iloc[4].tolist() == one.table.iloc[0].tolist()
    assert not torch.equal(one.y, draw_semantics(prior, [4], 4, {"diagnosis": "AD"}).y)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ({"scanner": "A"}, "no column 'scanner'; it has diagnosis, age, sex"),
        ({"diagnosis": "XX"}, "diagnosis of the training scans is AD or CN or MCI"),
        ({"age": "150"}, "age of the training scans is from "),
        ({"age": "old"}, "age of the training scans is from "),
    ],
)
def test_what_the_prior_does_not_know_is_refused_with_what_it_knows(data, where, said):
    prior = fitted(data)
    with pytest.raises(UserError, match=said):
        parse_conditions(prior.columns, prior.labels.ends, where)


@pytest.mark.parametrize("name", ["nothing", "path", "empty", "constant"])
def test_a_column_that_is_no_condition_is_refused(name):
    table = made_up_table().assign(empty="", constant=3)
    with pytest.raises(UserError, match=rf"stage\.columns: '{name}'"):
        find_columns(table, [name])


def test_columns_are_restored_from_a_config(data):
    assert read_columns(json.loads(json.dumps([column.to_dict() for column in data[0]]))) == data[0]
