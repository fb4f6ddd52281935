"""The voxel prior predicts independent Gaussian voxels exactly, and an untrained U-Net predicts what the prior does."""

import pytest
import torch

from ldae.data.latents import LatentSet
from ldae.denoiser import Denoiser
from ldae.diffusion import schedule
from ldae.diffusion.process import Epsilon, Velocity, add_noise
from ldae.diffusion.samplers import Multistep
from ldae.models.gradient_estimator import GradientEstimator
from ldae.models.unet import UNet
from ldae.models.voxel_prior import SMALLEST_STD, VoxelPrior
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
def test_mean_and_std_are_those_of_the_target_given_z_t(parameterisation, t):
    z0 = latents(3000)
    noise, times = draw_normal(MEAN.shape, 0, range(3000), "noise"), torch.full((3000,), t)
    z_t = add_noise(LINEAR, z0, noise, times)
    found = fitted(parameterisation)(z_t, times)
    rest = parameterisation.target(LINEAR, z0, noise, times) - found.mean
    # Averaged over the voxels, because the sampling error of a single one is 2 %.
    assert abs(float((found.standardised.square().mean(0)).mean()) - 1) < 0.005
    ratio = rest.square().mean(0) / found.std[0] ** 2
    assert abs(float(ratio.mean()) - 1) < 0.005
    assert ratio.min() > 0.85
    assert ratio.max() < 1.15
    assert abs(float((rest * found.standardised / found.std).mean())) < 0.005


@torch.no_grad()
def test_an_untrained_unet_inverts_such_voxels_to_codes_of_unit_variance():
    """Without the prior the standard deviation of a code is that of the latent, far from 1 in air."""
    unet = UNet(**SHAPE, prior=fitted(Velocity())).eval()
    z0 = latents(8)
    code = Multistep(steps=40).invert(Denoiser(unet, None, LINEAR, Velocity()).eps, z0, LINEAR).z
    low, high = code[:, 0, 0], code[:, 1, -1]
    assert float(low.std()) == pytest.approx(1, abs=0.06)
    assert float(high.std()) == pytest.approx(1, abs=0.06)
    plain = UNet(**SHAPE).eval()
    code = Multistep(steps=40).invert(Denoiser(plain, None, LINEAR, Velocity()).eps, z0, LINEAR).z
    assert float(code[:, 0, 0].std()) < 0.6


def test_the_estimate_is_scaled_by_the_std_of_the_prior():
    prior = fitted(Velocity())
    unet = UNet(**SHAPE, prior=prior).eval()
    estimator = GradientEstimator(semantic_dim=4, modes=2, **SHAPE).eval()
    torch.nn.init.ones_(estimator.path.conv.bias)
    z_t, t = draw_normal(MEAN.shape, 0, range(2), "z_t"), torch.tensor([100.0, 700.5])
    gradient = estimator(unet.features(z_t, t), torch.zeros(2, 4))
    assert torch.allclose(gradient, prior(z_t, t).std, atol=1e-6)


def test_the_maps_fit_any_latent_size_and_the_variance_is_clamped():
    prior = VoxelPrior(2, 16, 1000, Velocity())
    prior.fit(MEAN[:, :6, :, :5], 0 * VARIANCE[:, :6, :, :5], LINEAR)
    assert float(prior.variance.min()) == pytest.approx(SMALLEST_STD**2)
    assert prior(torch.zeros(1, 2, 6, 8, 5), torch.tensor([-1.0])).mean.isfinite().all()


def test_another_number_of_timesteps_or_channels_is_refused():
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
