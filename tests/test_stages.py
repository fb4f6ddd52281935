"""Proves what a step of each stage may and may not touch: discriminator, trunk, averages, the reference."""

import copy
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator

from ldae.config import Optim, TrainerSettings
from ldae.data.latents import LatentSet
from ldae.diffusion.process import Velocity
from ldae.diffusion.samplers import DDIM
from ldae.diffusion.schedule import linear
from ldae.models.autoencoder import AutoencoderKL
from ldae.models.convnext import ConvNeXt
from ldae.models.gradient_estimator import GradientEstimator
from ldae.models.semantic_encoder import SemanticEncoder
from ldae.models.unet import UNet
from ldae.stages.aekl import AutoencoderStage
from ldae.stages.pretrain import PretrainStage
from ldae.stages.repr import ReprStage
from ldae.utils.seeding import make_generator

SHAPE = (16, 16, 16)
UNET = {"base": 8, "multipliers": (1, 2), "residual_blocks": 1, "attention_at": (2,), "groups": 4, "dropout": 0.0}


class Cohort:
    """Eight scans of six subjects, in memory."""

    split_hash = "h"

    def __init__(self):
        self.x = torch.rand(8, 1, *SHAPE, generator=make_generator(0, "x"))
        take = lambda rows: self.x[torch.as_tensor(np.array(rows))]  # noqa: E731
        self.volumes = SimpleNamespace(batch=take, read_stored=take, decode=lambda x: x, shape=SHAPE)
        subjects = ["a", "a", "b", "c", "d", "e", "f", "f"]
        self.table = pd.DataFrame(
            {"subject": subjects, "session": ["ses-M000", "ses-M006"] * 4, "split": ["train"] * 4 + ["val"] * 4}
        )

    def rows(self, split):
        return np.flatnonzero((self.table["split"] == split).to_numpy())

    def draw_augmentation(self, seed, keys):
        return {}

    def augment(self, x, batch):
        return x


def batch(stage, indices):
    indices = np.array(indices)
    return {"index": indices, "position": indices, **stage.fetch(indices, indices, 0)}


def prepared(stage, **settings):
    stage.prepare(Accelerator(cpu=True), TrainerSettings(**{"ema": 0.5, **settings}), Optim(lr=1e-3), 0)
    return stage


def tensors(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before, module):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.fixture
def aekl():
    from monai.networks.nets import PatchDiscriminator

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(channels=(8, 8), residual_blocks=1, groups=4)
    discriminator = PatchDiscriminator(spatial_dims=3, in_channels=1, channels=4, num_layers_d=1)
    return prepared(AutoencoderStage(autoencoder, discriminator, None, 1e-7, 0.1, 1e-3, 0.025, 1, None, Cohort(), None))


def test_the_generators_backward_leaves_no_gradient_in_the_discriminator(aekl, monkeypatch):
    """Published defect: what the generator's backward left there was added to the discriminator's own."""
    discriminator = aekl.modules["discriminator"]
    seen = []
    accumulate = aekl.update_discriminator.accumulate

    def watched(*arguments):
        seen.append([p.grad for p in discriminator.parameters()])
        return accumulate(*arguments)

    monkeypatch.setattr(aekl.update_discriminator, "accumulate", watched)
    aekl.run_step([batch(aekl, [0, 1])], step=1)
    assert seen, "the discriminator had its turn"
    assert all(gradient is None for gradient in seen[0])


def test_the_discriminator_plays_along_from_its_start_only(aekl):
    before = tensors(aekl.modules["discriminator"])
    scalars = aekl.run_step([batch(aekl, [0, 1])], step=0).scalars
    assert "adversarial" not in scalars
    assert not moved(before, aekl.modules["discriminator"])
    scalars = aekl.run_step([batch(aekl, [0, 1]), batch(aekl, [2, 3])], step=1).scalars
    assert {"adversarial", "discriminator"} <= scalars.keys()
    assert moved(before, aekl.modules["discriminator"])


@pytest.mark.parametrize("culprit", ["generator_adversarial", "discriminator_adversarial"])
def test_generator_and_discriminator_move_both_or_neither(aekl, monkeypatch, culprit):
    """A loss of either that is not finite leaves weights, moments and the norms' statistics of both as they were."""
    aekl.run_step([batch(aekl, [0, 1])], step=1)
    before = {name: tensors(module) for name, module in aekl.modules.items()}
    first = {name: copy.deepcopy(optimizer.state_dict()["state"]) for name, optimizer in aekl.optimizers.items()}
    monkeypatch.setattr(f"ldae.stages.aekl.losses.{culprit}", lambda *scores: sum(s.mean() for s in scores) * np.nan)
    result = aekl.run_step([batch(aekl, [0, 1]), batch(aekl, [2, 3])], step=2)
    assert float(result.skipped) == 1
    assert result.finite.tolist() == [False, False]
    for name, module in aekl.modules.items():
        assert not moved(before[name], module)
        state = aekl.optimizers[name.replace("autoencoder", "generator")].state_dict()["state"]
        reference = first[name.replace("autoencoder", "generator")]
        assert all(torch.equal(state[i][key], reference[i][key]) for i in reference for key in reference[i])
    monkeypatch.undo()
    assert float(aekl.run_step([batch(aekl, [0, 1])], step=3).skipped) == 0
    assert all(moved(before[name], module) for name, module in aekl.modules.items())


def test_the_autoencoders_validation_is_better_for_a_better_reconstruction(aekl):
    metrics = aekl.validate()
    assert {"l1", "ssim", "ssim_mask"} == metrics.keys()
    for _ in range(30):
        aekl.run_step([batch(aekl, [0, 1, 2, 3])], step=0)
    assert aekl.validate()["l1"] < metrics["l1"]


def latents(cohort):
    shape = (8, 3, 4, 4, 4)
    mean = torch.randn(shape, generator=make_generator(1, "latent"))
    return LatentSet(cohort.table, mean, torch.full(shape, 0.1), torch.ones(3), "h", "sha")


def repr_stage(**encoder):
    """A stage 3 on a random trunk, without files."""
    cohort = Cohort()
    torch.manual_seed(0)
    stage = ReprStage.__new__(ReprStage)
    stage.cohort, stage.latents, stage.pairs = cohort, latents(cohort), np.arange(8)
    stage.train_rows, stage.num_samples = cohort.rows("train"), 4
    stage.schedule, stage.parameterisation, stage.sampler = linear(), Velocity(), DDIM(steps=2)
    stage.time_power, stage.other_visit = 1.0, 0.0
    stage.unet = UNet(**UNET).eval().requires_grad_(False)
    torch.nn.init.normal_(stage.unet.path.conv.weight, std=0.1)
    stage.autoencoder = AutoencoderKL(channels=(8, 8, 8), residual_blocks=1, groups=4).eval().requires_grad_(False)
    backbone = ConvNeXt(widths=(8, 16), depths=(1, 1), kernel=3, layer_scale=1.0, init_std=None)
    stage.modules = {
        "encoder": SemanticEncoder(backbone, slices=16, dim=32, heads=4, **encoder),
        "estimator": GradientEstimator(semantic_dim=32, modes=2, **UNET),
    }
    stage.modules["estimator"].start_from(stage.unet)
    return stage


def test_a_step_of_stage_3_moves_no_tensor_of_the_trunk_or_the_autoencoder():
    stage = prepared(repr_stage())
    trunk, autoencoder = tensors(stage.unet), tensors(stage.autoencoder)
    encoder, estimator = tensors(stage.modules["encoder"]), tensors(stage.modules["estimator"])
    for step in range(2):  # G is 0 at first: the encoder hears of it with the second step
        stage.run_step([batch(stage, [0, 1]), batch(stage, [2, 3])], step)
    assert not moved(trunk, stage.unet)
    assert not moved(autoencoder, stage.autoencoder)
    assert not stage.unet.training
    assert all(parameter.grad is None for parameter in stage.unet.parameters())
    assert moved(estimator, stage.modules["estimator"])
    assert moved(encoder, stage.modules["encoder"])


def test_only_what_is_trained_is_averaged_and_published():
    stage = prepared(repr_stage())
    assert set(stage.averages) == set(stage.weights()) == {"encoder", "estimator"}
    names = {name for part in stage.weights().values() for name in part}
    assert not any(name.startswith(("unet", "trunk", "down", "input")) for name in names)


def test_an_estimator_started_from_the_u_net_still_gives_nothing():
    """G is 0 to the bit: guided and unconditional eps are the same before training."""
    stage = prepared(repr_stage())
    z, t = stage.latents.mean[:2], torch.tensor([10, 900])
    y = stage.modules["encoder"](stage.cohort.x[:2])
    assert torch.equal(stage.denoiser.guided_eps(y)(z, t), stage.denoiser.eps(z, t))
    middle = stage.modules["estimator"].path.middle[0].conv2.weight
    assert torch.equal(middle, stage.unet.path.middle[0].conv2.weight)


def test_a_time_power_moves_the_draw_towards_high_noise():
    """Mean of T u^(1/p) is T p / (p + 1): a half for 1, two thirds for 2; never beyond the schedule."""
    stage = prepared(repr_stage())
    for stage.time_power, mean in ((1.0, 500), (2.0, 667)):
        t = stage.fetch(np.zeros(4000, dtype=int), np.arange(4000), 0)["t"]
        assert float(t.double().mean()) == pytest.approx(mean, abs=15)
        assert int(t.min()) >= 0
        assert int(t.max()) < 1000


def test_another_visit_of_the_subject_can_be_what_y_explains():
    """The draw belongs to the sample; who has one visit, or trains alone, explains it; no validation row is taken."""
    stage = repr_stage()
    stage.cohort.table["subject"] = ["a", "a", "a", "b", "b", "c", "a", "a"]
    prepared(stage)
    rows, keys = np.array([0, 1, 2, 3] * 200), range(800)
    assert (stage._explained(rows, keys) == rows).all()
    stage.other_visit = 0.5
    explained = stage._explained(rows, keys)
    assert set(explained[rows < 3]) == {0, 1, 2}
    assert (explained[rows == 3] == 3).all(), "its only other visit is in another split"
    assert (explained != rows)[rows < 3].mean() == pytest.approx(0.5, abs=0.07)
    assert stage._explained(rows[5:6], keys[5:6]) == explained[5:6]


@torch.no_grad()
def test_stage_3_measures_y_from_the_mean_of_the_training_scans():
    stage = prepared(repr_stage(reference=SHAPE))
    encoder = stage.modules["encoder"]
    x = stage.cohort.x[:4]
    torch.testing.assert_close(encoder.reference, x.mean(0, keepdim=True))
    torch.testing.assert_close(encoder.spread, (x - x.mean(0)).square().mean().sqrt())


def test_stage_3_validates_with_another_subjects_y():
    metrics = prepared(repr_stage()).validate()
    assert {"ssim", "z0_error/own_t800", "z0_error/other_t800", "z0_error/none_t800"} <= metrics.keys()
    assert metrics["z0_error/own_t800"] == metrics["z0_error/other_t800"], "G is 0 before training"


def test_noise_and_time_of_a_sample_do_not_depend_on_the_micro_batches():
    cohort = Cohort()
    stage = PretrainStage.__new__(PretrainStage)
    stage.schedule, stage.parameterisation, stage.latents = linear(), Velocity(), latents(cohort)
    stage.train_rows, stage.num_samples = cohort.rows("train"), 4
    stage.modules = {"unet": UNet(**UNET)}
    prepared(stage)
    whole = stage.fetch(np.array([0, 1, 2]), np.array([5, 6, 7]), 0)
    part = stage.fetch(np.array([2]), np.array([7]), 1)
    assert {"row", "posterior", "noise", "t"} == whole.keys() == part.keys()
    assert all(torch.equal(whole[name][2:], part[name]) for name in whole)
