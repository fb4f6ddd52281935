"""Proves that `trainer.compile=true` trains all three stages as without it: the same weights after some steps,
published under the same names, and resumed from a state that was written without it. The graphs are those that a GPU
gets; instead of compiling them, PyTorch runs them as they are, which takes seconds.
"""

import functools

import numpy as np
import pytest
import torch

from ldae.diffusion.process import Velocity
from ldae.diffusion.schedule import linear
from ldae.models.autoencoder import AutoencoderKL
from ldae.models.unet import UNet
from ldae.stages.aekl import AutoencoderStage
from ldae.stages.pretrain import PretrainStage
from ldae.training.checkpoint import Checkpoints, Progress
from test_stages import UNET, Cohort, batch, latents, prepared, repr_stage


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


def aekl():
    from monai.networks.nets import PatchDiscriminator

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(channels=(8, 8), residual_blocks=1, groups=4)
    discriminator = PatchDiscriminator(spatial_dims=3, in_channels=1, channels=4, num_layers_d=1)
    return AutoencoderStage(autoencoder, discriminator, None, 1e-7, 0.1, 1e-3, 0.025, 1, None, Cohort(), None)


def pretrain(monkeypatch):
    cohort = Cohort()
    monkeypatch.setattr("ldae.stages.pretrain.open_latents", lambda *_: latents(cohort))
    torch.manual_seed(0)
    return PretrainStage(UNet(**UNET), linear(), Velocity(), None, None, cohort, None)


BUILD = {"aekl": lambda _: aekl(), "pretrain": pretrain, "repr": lambda _: repr_stage(dropout=0.0)}


def trained(stage, first, last):
    for step in range(first, last):
        torch.manual_seed(step)
        result = stage.run_step([batch(stage, [0, 1]), batch(stage, [2, 3])], step + 1)
        assert float(result.skipped) == 0
    return stage


@pytest.mark.parametrize("name", BUILD)
def test_a_compiled_stage_trains_and_resumes_as_one_that_is_not(name, monkeypatch, tmp_path):
    plain = trained(prepared(BUILD[name](monkeypatch)), 0, 2)
    states = Checkpoints(tmp_path, keep=1)
    states.save(plain, Progress(step=2), None, {})
    compiled = trained(prepared(BUILD[name](monkeypatch), compile=True), 0, 2)
    same_weights(compiled, plain)
    resumed = prepared(BUILD[name](monkeypatch), compile=True)
    states.restore(states.newest(), resumed, None, {})
    same_weights(trained(resumed, 2, 3), trained(plain, 2, 3))
    assert np.isfinite(list(compiled.validate().values())).all()


def same_weights(stage, expected):
    own, others = stage.weights(), expected.weights()
    assert own.keys() == others.keys()
    for part, tensors in others.items():
        assert own[part].keys() == tensors.keys(), "compiled modules publish the names of plain ones"
        for key, tensor in tensors.items():
            torch.testing.assert_close(own[part][key], tensor, rtol=1e-4, atol=1e-5, msg=f"{part} {key}")


def test_the_stages_are_really_compiled(monkeypatch):
    """Else the test above would compare a stage with itself."""
    seen = []
    compile_ = torch.compile

    def watched(module):
        seen.append(type(module).__name__)
        return compile_(module)

    monkeypatch.setattr(torch, "compile", watched)
    for build in BUILD.values():
        prepared(build(monkeypatch), compile=True)
    assert seen == ["AutoencoderKL", "UNet", "Trunk", "Conditioner"]
