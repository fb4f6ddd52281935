"""What a step of each stage changes and what it must not change: discriminator, frozen U-Net, averages, mean volume."""

import copy

import numpy as np
import pytest
import torch

from ldae.data.visits import OtherVisits
from ldae.diffusion.guidance import Guidance, Score
from ldae.utils.errors import UserError
from small_stages import (
    SHAPE,
    FinishedRun,
    FinishedWorkspace,
    MadeUpCohort,
    aekl_stage,
    batch,
    prepared,
    pretrain_stage,
    repr_stage,
)


def tensors(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before, module):
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.fixture
def aekl():
    return prepared(aekl_stage())


def test_the_generators_backward_pass_leaves_no_gradient_in_the_discriminator(aekl, monkeypatch):
    """In the published code, gradients of the generator's loss were added to the discriminator's own."""
    discriminator = aekl.modules["discriminator"]
    seen = []
    accumulate = aekl.update_discriminator.accumulate

    def watched(*arguments):
        seen.append([p.grad for p in discriminator.parameters()])
        return accumulate(*arguments)

    monkeypatch.setattr(aekl.update_discriminator, "accumulate", watched)
    aekl.run_step([batch(aekl, [0, 1])], step=1)
    assert seen, "the discriminator was updated"
    assert all(gradient is None for gradient in seen[0])


def test_the_discriminator_is_switched_on_at_its_start(aekl):
    before = tensors(aekl.modules["discriminator"])
    scalars = aekl.run_step([batch(aekl, [0, 1])], step=0).scalars
    assert "adversarial" not in scalars
    assert not changed(before, aekl.modules["discriminator"])
    scalars = aekl.run_step([batch(aekl, [0, 1]), batch(aekl, [2, 3])], step=1).scalars
    assert {"adversarial", "discriminator"} <= scalars.keys()
    assert changed(before, aekl.modules["discriminator"])


@pytest.mark.parametrize("culprit", ["generator_adversarial", "discriminator_adversarial"])
def test_generator_and_discriminator_are_updated_together_or_not_at_all(aekl, monkeypatch, culprit):
    """If a loss of either is not finite, weights, moments and the statistics of the norms of both stay as they were."""
    aekl.run_step([batch(aekl, [0, 1])], step=1)
    before = {name: tensors(module) for name, module in aekl.modules.items()}
    first = {name: copy.deepcopy(optimizer.state_dict()["state"]) for name, optimizer in aekl.optimizers.items()}
    monkeypatch.setattr(f"ldae.stages.aekl.losses.{culprit}", lambda *scores: sum(s.mean() for s in scores) * np.nan)
    result = aekl.run_step([batch(aekl, [0, 1]), batch(aekl, [2, 3])], step=2)
    assert float(result.skipped) == 1
    assert result.finite.tolist() == [False, False]
    for name, module in aekl.modules.items():
        assert not changed(before[name], module)
        state = aekl.optimizers[name.replace("autoencoder", "generator")].state_dict()["state"]
        expected = first[name.replace("autoencoder", "generator")]
        assert all(torch.equal(state[i][key], expected[i][key]) for i in expected for key in expected[i])
    monkeypatch.undo()
    assert float(aekl.run_step([batch(aekl, [0, 1])], step=3).skipped) == 0
    assert all(changed(before[name], module) for name, module in aekl.modules.items())


def test_the_validation_l1_of_the_autoencoder_falls_with_training(aekl):
    metrics = aekl.validate()
    assert {"l1", "ssim", "ssim_mask"} == metrics.keys()
    for _ in range(30):
        aekl.run_step([batch(aekl, [0, 1, 2, 3])], step=0)
    assert aekl.validate()["l1"] < metrics["l1"]


def test_noise_and_time_of_a_sample_do_not_depend_on_the_micro_batches(tmp_path):
    stage = prepared(pretrain_stage(tmp_path))
    whole = stage.fetch(np.array([0, 1, 2]), np.array([5, 6, 7]), 0)
    part = stage.fetch(np.array([2]), np.array([7]), 1)
    assert {"row", "posterior", "noise", "t"} == whole.keys() == part.keys()
    assert all(torch.equal(whole[name][2:], part[name]) for name in whole)


def test_a_step_of_stage_3_changes_no_tensor_of_the_u_net_or_the_autoencoder(tmp_path):
    stage = prepared(repr_stage(tmp_path))
    unet, autoencoder = tensors(stage.unet), tensors(stage.autoencoder)
    encoder, estimator = tensors(stage.modules["encoder"]), tensors(stage.modules["estimator"])
    for step in range(2):  # G is 0 at first, so that the encoder has no gradient before the second step
        stage.run_step([batch(stage, [0, 1]), batch(stage, [2, 3])], step)
    assert not changed(unet, stage.unet)
    assert not changed(autoencoder, stage.autoencoder)
    assert not stage.unet.training
    assert all(parameter.grad is None for parameter in stage.unet.parameters())
    assert changed(estimator, stage.modules["estimator"])
    assert changed(encoder, stage.modules["encoder"])


def test_only_what_is_trained_is_averaged_and_published(tmp_path):
    stage = prepared(repr_stage(tmp_path))
    assert set(stage.averages) == set(stage.weights()) == {"encoder", "estimator"}
    names = {name for part in stage.weights().values() for name in part}
    assert not any(name.startswith(("unet", "trunk", "down", "input")) for name in names)


@torch.no_grad()
def test_an_estimator_started_from_the_u_net_gives_0_before_training(tmp_path):
    """Guided and unconditional eps are then equal to the bit."""
    stage = prepared(repr_stage(tmp_path))
    z, t = stage.latents.mean[:2], torch.tensor([10, 900])
    y = stage.modules["encoder"](stage.cohort.x[:2])
    assert torch.equal(stage.denoiser.guided_eps(y)(z, t), stage.denoiser.eps(z, t))
    middle = stage.modules["estimator"].path.middle[0].conv2.weight
    assert torch.equal(middle, stage.unet.path.middle[0].conv2.weight)


@torch.no_grad()
def test_guided_eps_adds_k_times_the_gradient_of_the_chosen_form(tmp_path):
    denoiser = prepared(repr_stage(tmp_path)).denoiser
    for parameter in denoiser.estimator.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    z, t, y = torch.randn(2, 3, 4, 4, 4), torch.tensor([10, 900]), torch.randn(2, 32)
    for guidance in (Guidance(), Guidance(form=Score(), strength=2.0)):
        form = guidance.form or denoiser.parameterisation.trained_form
        k = guidance.strength * form.coefficient(denoiser.schedule, t).float().view(-1, 1, 1, 1, 1)
        expected = denoiser.eps(z, t) + k * denoiser.gradient(z, t, y)
        assert not torch.equal(expected, denoiser.eps(z, t))
        torch.testing.assert_close(denoiser.guided_eps(y, guidance)(z, t), expected)


@pytest.mark.parametrize(("time_power", "mean"), [(1.0, 500), (2.0, 667)])
def test_a_larger_time_power_draws_more_timesteps_at_high_noise(tmp_path, time_power, mean):
    """The mean of T u^(1/p) is T p / (p + 1): T / 2 for p = 1, 2 T / 3 for p = 2."""
    stage = prepared(repr_stage(tmp_path, time_power))
    t = stage.fetch(np.zeros(4000, dtype=int), np.arange(4000), 0)["t"]
    assert float(t.double().mean()) == pytest.approx(mean, abs=15)
    assert int(t.min()) >= 0
    assert int(t.max()) < 1000


def test_a_share_of_samples_is_replaced_by_another_training_visit_of_the_subject():
    subjects, train_rows = ["a", "a", "a", "b", "b", "c", "a", "a"], np.arange(4)
    rows, keys = np.array([0, 1, 2, 3] * 200), range(800)
    assert (OtherVisits(subjects, train_rows, share=0.0, seed=0).choose(rows, keys) == rows).all()
    visits = OtherVisits(subjects, train_rows, share=0.5, seed=0)
    chosen = visits.choose(rows, keys)
    assert set(chosen[rows < 3]) == {0, 1, 2}
    assert (chosen[rows == 3] == 3).all(), "the only other visit of this subject is in another split"
    assert (chosen != rows)[rows < 3].mean() == pytest.approx(0.5, abs=0.07)
    assert visits.choose(rows[5:6], keys[5:6]) == chosen[5:6], "the choice depends on the key of the sample alone"


@torch.no_grad()
def test_the_encoder_gets_the_mean_of_the_training_scans(tmp_path):
    stage = prepared(repr_stage(tmp_path, mean_volume_shape=SHAPE))
    encoder = stage.modules["encoder"]
    x = stage.cohort.x[:4]
    torch.testing.assert_close(encoder.mean_volume, x.mean(0, keepdim=True))
    torch.testing.assert_close(encoder.difference_std, (x - x.mean(0)).square().mean().sqrt())


def test_stage_3_validates_with_own_and_another_subjects_y(tmp_path):
    metrics = prepared(repr_stage(tmp_path)).validate()
    assert {"ssim", "z0_error/own_t800", "z0_error/other_t800", "z0_error/none_t800"} <= metrics.keys()
    assert metrics["z0_error/own_t800"] == metrics["z0_error/other_t800"], "G is 0 before training"


@pytest.mark.parametrize("build", [pretrain_stage, repr_stage])
def test_latents_and_predecessors_of_another_split_are_refused(tmp_path, monkeypatch, build):
    monkeypatch.setattr(MadeUpCohort, "split_hash", "another")
    with pytest.raises(UserError, match="another split"):
        build(tmp_path)


def test_stage_3_refuses_a_unet_that_learned_latents_of_another_scale(tmp_path, monkeypatch):
    run = FinishedRun("pretrain")
    run.metadata["scale"] = [1.0, 1.01, 1.0]
    monkeypatch.setattr(FinishedWorkspace, "predecessor", lambda space, name, path=None: run)
    with pytest.raises(UserError, match="another scale"):
        repr_stage(tmp_path)
