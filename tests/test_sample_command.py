"""Tests `ldae sample` and `LDAE.sample`: a cohort with its table from one command, which continues; what is refused;
and the place of the prior in runs and bundles.
"""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ldae import LDAE
from ldae.cli import main
from ldae.data.table import read_table
from ldae.runs import Workspace
from small_prior import fitted, made_up_people


@pytest.fixture(scope="module")
def place(run, tmp_path_factory):
    """A folder with `runs/small`, a model with a prior, and `runs/bare`, the same without."""
    folder = tmp_path_factory.mktemp("prior")
    for name in ("bare", "small"):
        shutil.copytree(run, folder / "runs" / name)
    people, space = made_up_people(), Workspace(folder / "runs/small")
    prior = fitted(people, torch.cat([people[2], people[2][:, :4]], 1), components=4)
    entries = [column.to_dict() for column in people[0]]
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
    assert ldae("sample", "-n", 2, "--steps", 2, "-o", "grown", "--run", "small").exit_code == 0
    first, stamp = read("grown/sample01.nii.gz"), (place / "grown/sample01.nii.gz").stat().st_mtime_ns
    (place / "grown/sample02.nii.gz").unlink()
    assert ldae("sample", "-n", 3, "--steps", 2, "-o", "grown", "--run", "small").exit_code == 0
    assert (place / "grown/sample01.nii.gz").stat().st_mtime_ns == stamp
    assert len(read_table(place / "grown/scans.csv")) == 3
    model = LDAE.load("runs/small", device="cpu")
    together = model.sample(3, seed=0, steps=2)[:, 0].numpy()
    np.testing.assert_allclose(together[0], first, atol=1e-4)
    np.testing.assert_allclose(together[1], read("grown/sample02.nii.gz"), atol=1e-4)
    result = ldae("sample", "-n", 3, "--steps", 2, "-o", "grown", "--run", "small", "--seed", 1)
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
