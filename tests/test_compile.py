"""`trainer.compile=true` trains all three stages as without it: the same weights after some steps, published under the
same names, and resumed from a checkpoint that was written without it. The graphs are those that a GPU gets, but PyTorch
runs them without compiling them, which takes seconds.
"""

import functools

import numpy as np
import pytest
import torch

from ldae.training.checkpoint import Checkpoints, Progress
from small_stages import aekl_stage, batch, prepared, pretrain_stage, repr_stage


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch.compiler.reset()


BUILD = {
    "aekl": lambda folder: aekl_stage(),
    "pretrain": pretrain_stage,
    "repr": lambda folder: repr_stage(folder, dropout=0.0),
}


def trained(stage, first, last):
    for step in range(first, last):
        torch.manual_seed(step)
        result = stage.run_step([batch(stage, [0, 1]), batch(stage, [2, 3])], step + 1)
        assert float(result.skipped) == 0
    return stage


@pytest.fixture
def build(tmp_path):
    """Builds a stage and prepares it for training, each time from the same weights and latents."""

    def build(name, **settings):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return prepared(BUILD[name](folder), **settings)

    return build


@pytest.mark.parametrize("name", BUILD)
def test_a_compiled_stage_trains_and_resumes_as_one_that_is_not(name, build, tmp_path):
    plain = trained(build(name), 0, 2)
    states = Checkpoints(tmp_path / "state", keep=1)
    states.save(plain, Progress(step=2), None, {})
    compiled = trained(build(name, compile=True), 0, 2)
    assert_same_weights(compiled, plain)
    resumed = build(name, compile=True)
    states.restore(states.newest(), resumed, None, {})
    assert_same_weights(trained(resumed, 2, 3), trained(plain, 2, 3))
    assert np.isfinite(list(compiled.validate().values())).all()


def assert_same_weights(stage, expected):
    own, others = stage.weights(), expected.weights()
    assert own.keys() == others.keys()
    for part, tensors in others.items():
        assert own[part].keys() == tensors.keys(), "compiled modules publish the names of plain ones"
        for key, tensor in tensors.items():
            torch.testing.assert_close(own[part][key], tensor, rtol=1e-4, atol=1e-5, msg=f"{part} {key}")


def test_every_stage_compiles_its_networks(monkeypatch, build):
    """Without this, the test above might compare a stage with itself."""
    seen = []
    compile_ = torch.compile

    def watched(module):
        seen.append(type(module).__name__)
        return compile_(module)

    monkeypatch.setattr(torch, "compile", watched)
    for name in BUILD:
        build(name, compile=True)
    assert seen == ["AutoencoderKL", "UNet", "Trunk", "Conditioner"]
