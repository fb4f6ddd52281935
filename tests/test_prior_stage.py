"""Tests the stage of the semantic prior on eight made-up scans: it resumes, learns from training scans alone, knows its
encoder, and refuses what does not belong together.
"""

import shutil

import pytest
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf

from ldae.config import Optim, PriorSettings, TrainerSettings
from ldae.models.components_encoder import ComponentsEncoder
from ldae.runs import Workspace, prior_node
from ldae.stages.prior import PriorStage
from ldae.training.trainer import Trainer
from ldae.utils.errors import UserError
from ldae.utils.seeding import make_generator
from small_stages import SHAPE, MadeUpCohort

PRIOR = {"components": 3, "hidden": 2, "width": 8}


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
    assert not (run.path / "state").exists()  # it is fitted anew whenever the encoder or the columns have changed
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
