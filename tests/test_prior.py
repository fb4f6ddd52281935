"""Tests the semantic prior on made-up y: whitening, its Gaussian and its network, labels and draws; its stage, its
place in runs and bundles, and `ldae sample`.
"""

import json
import shutil

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from click.testing import CliRunner
from omegaconf import OmegaConf

from ldae import LDAE
from ldae.cli import main
from ldae.config import Optim, PriorSettings, TrainerSettings
from ldae.data.table import read_table
from ldae.models.components_encoder import ComponentsEncoder
from ldae.prior.columns import encode_table, find_columns, parse_conditions, read_columns
from ldae.prior.draws import draw_semantics
from ldae.prior.semantic_prior import SemanticPrior
from ldae.prior.whitening import Whitening
from ldae.runs import Workspace, prior_node
from ldae.stages.prior import PriorStage
from ldae.training.trainer import Trainer
from ldae.utils.errors import UserError
from ldae.utils.seeding import make_generator
from small_stages import SHAPE, MadeUpCohort

PEOPLE = 300


def made_up_table():
    """Labels of people of whom those with AD are older; one age and one sex are missing."""
    rng = np.random.default_rng(0)
    diagnosis = rng.choice(["CN", "AD", "MCI"], PEOPLE, p=[0.5, 0.3, 0.2])
    age = rng.normal(65, 6, PEOPLE).round(2) + 10 * (diagnosis == "AD")
    table = pd.DataFrame({"diagnosis": diagnosis, "age": age, "sex": rng.choice(["F", "M"], PEOPLE), "path": "x.nii"})
    table.loc[3, "age"], table.loc[5, "sex"] = np.nan, ""
    return table


def made_up_y(table, dim=12):
    """y in 4 of 12 dimensions: the first moves with AD, the second with age, the third has two modes."""
    h = torch.randn(PEOPLE, 4, generator=make_generator(0, "h"))
    h[:, 0] += 3 * torch.from_numpy((table["diagnosis"] == "AD").to_numpy())
    h[:, 1] += torch.from_numpy((table["age"].fillna(65).to_numpy() - 65) / 4).float()
    h[:, 2] = h[:, 2].sign() + 0.1 * h[:, 3]
    return 5 + h @ torch.randn(4, dim, generator=make_generator(0, "axes"))


@pytest.fixture(scope="module")
def data():
    table = made_up_table()
    columns = find_columns(table, ["diagnosis", "age", "sex"])
    return columns, encode_table(columns, table), made_up_y(table), table


def fitted(data, **options):
    columns, labels, y, _ = data
    torch.manual_seed(0)
    prior = SemanticPrior(y.shape[1], [column.to_dict() for column in columns], components=6, **options)
    prior.fit(y, labels, torch.full((PEOPLE,), 1 / PEOPLE), PEOPLE)
    return prior.eval()


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
    for _ in range(400):
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


class Cohort(MadeUpCohort):
    """The eight scans of six subjects with a diagnosis and an age."""

    view_key = None

    class transform:
        """A transform with a key."""

        key = staticmethod(lambda: "t")

    def __init__(self):
        super().__init__()
        self.table["diagnosis"] = ["AD", "AD", "CN", "CN"] * 2
        self.table["age"] = [70.0, 71.0, 60.0, 65.0, 80.0, 50.0, 62.0, 63.0]

    def digest_views(self):
        return self.digest_scans()


def stage(folder, cohort=None, hidden=2, columns=("diagnosis", "age")):
    """The stage after a stage 3 whose encoder has components of the training scans."""
    cohort, space = cohort or Cohort(), Workspace(folder)
    config = {"_target_": "ldae.models.components_encoder.ComponentsEncoder", "shape": [1, *SHAPE], "components": 3}
    encoder = ComponentsEncoder(config["shape"], 3, 32)
    directions = torch.linalg.qr(torch.randn(16**3, 3, generator=make_generator(0, "d"))).Q.T.reshape(3, 1, *SHAPE)
    encoder.set_components(torch.full((1, *SHAPE), 0.5), directions, torch.ones(3))
    third = space.stage("repr")
    third.publish({"encoder": encoder.state_dict()}, {"split_hash": cohort.split_hash, "transform": "t"})
    third.write_config(OmegaConf.create({"model": {"encoder": {**config, "dim": 32}}}))
    settings = OmegaConf.structured(PriorSettings(components=3, hidden=hidden, width=8))
    torch.manual_seed(0)
    return PriorStage(settings, list(columns), 0.1, None, None, cohort=cohort, workspace=space)


def train(folder, steps, **options):
    """Train the stage in `folder` up to a step; returns its run."""
    made, run = stage(folder, **options), Workspace(folder).stage("prior")
    settings = TrainerSettings(max_steps=steps, batch_size=4, ema=0.9, validate_every=2, checkpoint_every=1)
    Trainer(Accelerator(cpu=True), run, settings, Optim(lr=1e-2), 0).fit(made, {})
    return run


def weights(run):
    return run.module("prior", prior_node(OmegaConf.create(PRIOR), 32, run.metadata["columns"])).state_dict()


PRIOR = {"components": 3, "hidden": 2, "width": 8}


def test_two_and_two_steps_are_four(tmp_path):
    whole = weights(train(tmp_path / "a", 4))
    train(tmp_path / "b", 2)
    resumed = weights(train(tmp_path / "b", 4))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert float(whole["network.output.weight"].abs().max()) > 0


def test_validation_scans_are_only_validated_on(tmp_path):
    cohort = Cohort()
    before = weights(train(tmp_path / "a", 1, cohort=cohort))
    cohort.x[4:] = 0.123
    cohort.table.loc[4:, "age"] = 20.0
    after = weights(train(tmp_path / "b", 1, cohort=cohort))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_gaussian_is_published_without_steps_and_knows_its_encoder(tmp_path):
    run = train(tmp_path, 4, hidden=0)
    assert run.metadata["step"] == 0
    assert run.metadata["encoder_sha256"] == Workspace(tmp_path).stage("repr").sha256("encoder")
    prior = run.module("prior", prior_node(OmegaConf.create({"components": 3}), 32, run.metadata["columns"]))
    assert int(prior.whitening.exists.sum()) == 3
    made = stage(tmp_path, hidden=0)
    made.prepare(Accelerator(cpu=True), TrainerSettings(), Optim(), 0)
    losses = made.validate()
    assert losses["loss"] == losses["loss_gaussian"] > 0


def test_a_missing_stage_or_column_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match="no column that describes a scan"):
        stage(tmp_path, columns=["diagnose"])
    shutil.rmtree(tmp_path / "repr")
    settings = OmegaConf.structured(PriorSettings())
    with pytest.raises(UserError, match="stage=repr"):
        PriorStage(settings, [], 0.1, None, None, cohort=Cohort(), workspace=Workspace(tmp_path))
    assert not (tmp_path / "prior").exists()


@pytest.fixture(scope="module")
def place(run, tmp_path_factory, data):
    """A folder with `runs/small`, a model with a prior, and `runs/bare`, the same without."""
    folder = tmp_path_factory.mktemp("prior")
    for name in ("bare", "small"):
        shutil.copytree(run, folder / "runs" / name)
    columns, labels, y, _ = data
    entries, space = [column.to_dict() for column in columns], Workspace(folder / "runs/small")
    prior = SemanticPrior(16, entries, components=4)
    prior.fit(torch.cat([y, y[:, :4]], 1), labels, torch.full((PEOPLE,), 1 / PEOPLE), PEOPLE)
    encoder = space.stage("repr").sha256("encoder")
    made = space.stage("prior")
    made.publish({"prior": prior.state_dict()}, {"encoder_sha256": encoder, "columns": entries})
    config = space.stage("repr").config
    config.model.prior = {"components": 4}
    made.write_config(config)
    return folder


@pytest.fixture
def ldae(place, monkeypatch):
    """A function that runs a command in `place` and returns click's result."""
    monkeypatch.chdir(place)
    return lambda *words: CliRunner().invoke(main, [*map(str, words), "--device", "cpu"])


def read(path):
    return nib.load(path).get_fdata()


def test_one_command_makes_a_cohort_with_its_table(ldae, place):
    where = ("--where", "diagnosis=AD", "--where", "age=80")
    assert ldae("sample", "-n", 3, *where, "-o", "cohort", "--run", "small").exit_code == 0
    table = read_table(place / "cohort/scans.csv")
    assert table["diagnosis"].tolist() == ["AD"] * 3
    assert table["age"].tolist() == [80.0] * 3
    assert table["sex"].isin(["F", "M"]).all()
    assert table["subject"].is_unique
    assert all(read(path).shape == (8, 8, 8) for path in table["path"])


def test_the_same_command_continues_and_more_samples_leave_the_first_as_they_are(ldae, place):
    assert ldae("sample", "-n", 2, "-o", "grown", "--run", "small").exit_code == 0
    first, stamp = read("grown/sample01.nii.gz"), (place / "grown/sample01.nii.gz").stat().st_mtime_ns
    (place / "grown/sample02.nii.gz").unlink()
    assert ldae("sample", "-n", 3, "-o", "grown", "--run", "small").exit_code == 0
    assert (place / "grown/sample01.nii.gz").stat().st_mtime_ns == stamp
    assert len(read_table(place / "grown/scans.csv")) == 3
    model = LDAE.load("runs/small", device="cpu")
    together = model.sample(3, seed=0)[:, 0].numpy()
    np.testing.assert_allclose(together[0], first, atol=1e-4)
    np.testing.assert_allclose(together[1], read("grown/sample02.nii.gz"), atol=1e-4)
    result = ldae("sample", "-n", 3, "-o", "grown", "--run", "small", "--seed", 1)
    assert result.exit_code == 2
    assert "samples of another seed" in result.output


def test_a_bundle_takes_the_prior_along(ldae, place):
    assert CliRunner().invoke(main, ["export", "small", "-o", "bundle"]).exit_code == 0
    assert "given diagnosis, age, sex" in (place / "bundle/README.md").read_text()
    for name, model in (("by_run", ("--run", "small")), ("by_bundle", ("--bundle", "bundle"))):
        assert ldae("sample", "-n", 1, "--where", "sex=F", "-o", name, *model).exit_code == 0
    np.testing.assert_array_equal(read("by_run/sample01.nii.gz"), read("by_bundle/sample01.nii.gz"))


def test_a_prior_of_another_encoder_is_left_out(ldae, place, caplog):
    shutil.copytree(place / "runs/small", place / "runs/stale")
    path = place / "runs/stale/prior/weights/metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "encoder_sha256": "other"}))
    assert LDAE.load("runs/stale", device="cpu").prior is None
    assert "another encoder" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--run", "bare"], "stage=prior name=bare"),
        (["--run", "bare"], "--without-prior"),
        (["--run", "bare", "--where", "diagnosis=AD"], "stage=prior name=bare"),
        (["--run", "small", "--where", "diagnosis"], "give COLUMN=VALUE"),
        (["--run", "small", "--where", "diagnosis=XX"], "AD or CN or MCI"),
        (["--run", "small", "--where", "smoker=yes"], "diagnosis, age, sex"),
        (["--run", "small", "--where", "sex=F", "--without-prior"], "leave out --without-prior"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(ldae, place, words, said):
    result = ldae("sample", "-o", "refused", *words)
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (place / "refused").exists()


def test_without_a_prior_sampling_is_possible_when_it_is_asked_for(ldae, place):
    assert ldae("sample", "-n", 1, "--without-prior", "-o", "alone", "--run", "bare").exit_code == 0
    table = read_table(place / "alone/scans.csv")
    assert table["diagnosis"].tolist() == [""]
    small, bare = (LDAE.load(f"runs/{name}", device="cpu") for name in ("small", "bare"))
    alone = small.sample(1, use_prior=False)
    torch.testing.assert_close(alone, bare.sample(1))
    assert float((alone - small.sample(1)).abs().max()) > 0
