"""The voxels' prior is the exact prediction for independent normal voxels, and what an untrained U-Net says."""

import pytest
import torch

from ldae.data.latents import LatentSet
from ldae.denoiser import Denoiser
from ldae.diffusion import schedule
from ldae.diffusion.process import Epsilon, Velocity, add_noise
from ldae.diffusion.samplers import Multistep
from ldae.models.gradient_estimator import GradientEstimator
from ldae.models.unet import UNet
from ldae.models.voxel_prior import LEAST, VoxelPrior
from ldae.utils.errors import UserError
from ldae.utils.seeding import draw_normal

SHAPE = {"in_channels": 2, "base": 8, "multipliers": (1, 2), "residual_blocks": 1, "groups": 4}
LINEAR = schedule.linear()


VARIANCE = torch.linspace(0.05, 4, 2 * 8**3).reshape(2, 8, 8, 8)
MEAN = torch.linspace(-1, 2, 2 * 8**3).reshape(2, 8, 8, 8).flip(1)


def fitted(parameterisation):
    prior = VoxelPrior(2, 8, 1000, parameterisation)
    prior.fit(MEAN, VARIANCE, LINEAR)
    return prior


def latents(count):
    return MEAN + VARIANCE.sqrt() * draw_normal(MEAN.shape, 0, range(count), "z0")


@pytest.mark.parametrize("parameterisation", [Velocity(), Epsilon()])
@pytest.mark.parametrize("t", [3, 300, 950])
def test_expected_is_the_regression_on_z_t_and_deviation_what_it_leaves(parameterisation, t):
    z0 = latents(3000)
    noise, times = draw_normal(MEAN.shape, 0, range(3000), "noise"), torch.full((3000,), t)
    z_t = add_noise(LINEAR, z0, noise, times)
    found = fitted(parameterisation)(z_t, times)
    rest = parameterisation.target(LINEAR, z0, noise, times) - found.expected
    # Over all voxels: the sampling error of one voxel is 2 %.
    assert abs(float((found.unit.square().mean(0)).mean()) - 1) < 0.005
    ratio = rest.square().mean(0) / found.deviation[0] ** 2
    assert abs(float(ratio.mean()) - 1) < 0.005
    assert ratio.min() > 0.85
    assert ratio.max() < 1.15
    assert abs(float((rest * found.unit / found.deviation).mean())) < 0.005


@torch.no_grad()
def test_untrained_network_turns_such_voxels_into_a_normal_code():
    """Without the prior a code's deviation is the latent's, far from 1 in air."""
    unet = UNet(**SHAPE, prior=fitted(Velocity())).eval()
    z0 = latents(8)
    code = Multistep(steps=40).invert(Denoiser(unet, None, LINEAR, Velocity()).eps, z0, LINEAR).z
    low, high = code[:, 0, 0], code[:, 1, -1]
    assert float(low.std()) == pytest.approx(1, abs=0.06)
    assert float(high.std()) == pytest.approx(1, abs=0.06)
    plain = UNet(**SHAPE).eval()
    code = Multistep(steps=40).invert(Denoiser(plain, None, LINEAR, Velocity()).eps, z0, LINEAR).z
    assert float(code[:, 0, 0].std()) < 0.6


def test_estimate_counts_in_the_deviations_that_the_prior_leaves():
    prior = fitted(Velocity())
    unet = UNet(**SHAPE, prior=prior).eval()
    estimator = GradientEstimator(semantic_dim=4, modes=2, **SHAPE).eval()
    torch.nn.init.ones_(estimator.path.conv.bias)
    z_t, t = draw_normal(MEAN.shape, 0, range(2), "z_t"), torch.tensor([100.0, 700.5])
    gradient = estimator(unet.features(z_t, t), torch.zeros(2, 4))
    assert torch.allclose(gradient, prior(z_t, t).deviation, atol=1e-6)


def test_map_takes_any_grid_and_keeps_off_zero():
    prior = VoxelPrior(2, 16, 1000, Velocity())
    prior.fit(MEAN[:, :6, :, :5], 0 * VARIANCE[:, :6, :, :5], LINEAR)
    assert float(prior.variance.min()) == pytest.approx(LEAST**2)
    assert prior(torch.zeros(1, 2, 6, 8, 5), torch.tensor([-1.0])).expected.isfinite().all()


def test_refuses_another_schedule_or_number_of_channels():
    prior = VoxelPrior(2, 8, 500, Velocity())
    with pytest.raises(UserError, match="500 timesteps"):
        prior.fit(MEAN, VARIANCE, LINEAR)
    with pytest.raises(UserError, match="the latents 1"):
        VoxelPrior(2, 8, 1000, Velocity()).fit(MEAN[:1], VARIANCE[:1], LINEAR)


def test_moments_are_those_of_drawn_latents():
    mean, std = draw_normal((3, 4, 4, 4), 0, range(5), "mean"), torch.full((5, 3, 4, 4, 4), 0.5)
    encoded = LatentSet(None, mean, std, torch.tensor([1.0, 2.0, 3.0]), "", "")
    drawn = encoded.sample(torch.tensor([0, 2]).repeat(4000), draw_normal((3, 4, 4, 4), 1, range(8000), "noise"))
    found = encoded.moments([0, 2])
    assert torch.allclose(found[0], drawn.mean(0), atol=0.1)
    assert torch.allclose(found[1], drawn.var(0), rtol=0.15)
