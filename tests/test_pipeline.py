"""Tests class LDAE: its methods agree with each other and with the networks, and need nothing of ldae.evaluation."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from ldae.diffusion.guidance import Guidance, Score
from ldae.diffusion.samplers import DDIM
from ldae.editing.direction import Direction
from ldae.editing.units import Calibration, TrainingDistance
from ldae.utils.errors import UserError

X = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_latent_is_the_posterior_mean_scaled_by_channel(model):
    mean, std = model.posterior(X)
    assert mean.shape == std.shape == (2, 3, 4, 4, 4)
    scale = torch.tensor([1.5, 2.0, 0.5]).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(model.compress(X), scale * mean)
    torch.testing.assert_close(model.decompress(model.compress(X)), model.autoencoder.decode(mean))


def test_decoding_inverts_inversion_given_the_same_y(model):
    y, z = model.embed(X), model.compress(X)
    assert y.shape == (2, 16)
    code = model.invert(z, y, steps=20)
    assert model.decode(code, y).shape == X.shape
    own, other = (model.generate(code, given, steps=20) - z for given in (y, -y))
    assert own.abs().max() < 0.1
    assert other.abs().max() > 0.5  # another y gives another latent


def test_edits_change_y_and_keep_the_code(model):
    y = model.embed(X)
    same = model.decode(model.invert(model.compress(X), y), y)
    torch.testing.assert_close(model.reconstruct(X), same)
    torch.testing.assert_close(model.manipulate(X, "diagnosis", 0.0), same)
    assert not torch.allclose(model.manipulate(X, "diagnosis", 2.0), same, atol=1e-3)
    torch.testing.assert_close(model.interpolate(X, X.flip(0), 0.0), same, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.interpolate(X, X.flip(0), 1.0), same.flip(0), atol=1e-5, rtol=0)


def test_settings_of_an_edit_replace_the_models_own(model):
    y, z = model.embed(X), model.compress(X)
    edited_y = model.direction("diagnosis").edit(y, 2.0)
    options = {"steps": 6, "strength": 0.5}
    code = model.invert(z, y, depth=0.6, **options)
    edited = model.manipulate(X, "diagnosis", 2.0, depth=0.6, **options)
    torch.testing.assert_close(edited, model.decode(code, edited_y, **options))
    assert not torch.allclose(edited, model.manipulate(X, "diagnosis", 2.0, depth=0.6, steps=6), atol=1e-3)
    known_y = next(model.manipulate_each(X, "diagnosis", [2.0], y=y, depth=0.6, **options))
    torch.testing.assert_close(known_y, edited)


def test_a_sampler_replaces_the_models_own(model):
    y, z = model.embed(X), model.compress(X)
    sampler = replace(DDIM(steps=5), guidance=Guidance(Score(), strength=0.5))
    eps_fn = model.denoiser.guided_eps(y, sampler.guidance)
    code = sampler.invert(eps_fn, z, model.denoiser.schedule)
    torch.testing.assert_close(model.invert(z, y, sampler=sampler).z, code.z)
    torch.testing.assert_close(
        model.generate(code, y, sampler=sampler), sampler.sample(eps_fn, code, model.denoiser.schedule)
    )


def test_an_edit_by_alpha_raises_the_probes_decision_by_alpha_times_its_slope(model):
    y = model.embed(X)
    probe = model.probes["diagnosis"]
    before, after = (probe.decision(v.numpy()) for v in (y, model.direction("diagnosis").edit(y, 0.5)))
    np.testing.assert_allclose(after - before, 0.5 * 16**0.5 * np.linalg.norm(probe.coef), rtol=1e-4)
    with pytest.raises(UserError, match="no probe or direction 'sex'; it has diagnosis"):
        model.manipulate(X, "sex", 1.0)


def test_an_edit_by_an_amount_is_the_edit_by_the_alpha_that_it_corresponds_to(model):
    length = Calibration("age", 0.25, deviation=8.0)
    along = Direction(np.zeros(16), np.ones(16), np.eye(16)[0], TrainingDistance().scale(length, 16), length)
    torch.testing.assert_close(model.manipulate(X, along, by=4.0), model.manipulate(X, along, 0.5))
    with pytest.raises(UserError, match="give alpha or by"):
        model.manipulate(X, along, 1.0, by=4.0)
    with pytest.raises(UserError, match="stored without a calibration"):
        model.manipulate(X, "diagnosis", by=4.0)


def test_a_sample_does_not_depend_on_the_number_of_samples(model):
    torch.testing.assert_close(model.sample(3, seed=5)[:2], model.sample(2, seed=5), atol=1e-5, rtol=0)
    varied = model.vary(X[:1], 2, seed=5)
    assert varied.shape == X.shape
    assert not torch.allclose(varied[0], varied[1])


def test_predicted_noise_and_gradient_are_those_of_the_networks(model):
    z, y = model.compress(X), model.embed(X)
    t = torch.tensor([10.5, 900.0])
    parts = model.denoiser
    expected = parts.parameterisation.to_eps(parts.schedule, parts.unet(z, t), z, t)
    torch.testing.assert_close(model.predict_noise(z, t), expected)
    torch.testing.assert_close(model.estimate_gradient(z, t, y), parts.estimator(parts.unet.features(z, t), y))


def test_a_returned_latent_can_require_a_gradient(model):
    z = model.compress(X).requires_grad_()
    model.autoencoder.decode(z).sum().backward()
    assert z.grad is not None


def test_no_method_imports_the_evaluation(run, tmp_path):
    code = f"""
import sys, torch
from ldae import LDAE
model = LDAE.load({str(run)!r}, device="cpu")
x = torch.rand(2, 1, 8, 8, 8)
model.reconstruct(x), model.attention(x), model.vary(x[:1], 2), model.sample(1), model.interpolate(x, x, 0.5)
model.manipulate(x, "diagnosis", 1.0, renoise=0.5), model.readouts.predict_label("diagnosis", model.embed(x).numpy())
model.export({str(tmp_path / "bundle")!r})
found = [name for name in sys.modules if name.startswith("ldae.evaluation")]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
