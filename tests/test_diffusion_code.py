"""Codes (interpolation and batches), the diagnostics against distributions with known answers, and the configs of
diffusion and samplers, which all build."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import analytic
from ldae.diffusion.code import Code
from ldae.diffusion.diagnostics import measure_gaussianity, posterior_mean_gap
from ldae.diffusion.samplers import DDIM, Exact, Multistep
from ldae.diffusion.schedule import linear
from ldae.utils.errors import UserError

CONF = Path(__file__).parents[1] / "conf"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slerp(a: torch.Tensor, b: torch.Tensor, t: float | torch.Tensor) -> torch.Tensor:
    return Code(a).slerp(Code(b), t).z


def test_slerp_starts_at_a_ends_at_b_and_keeps_the_norm():
    a, b = normal(2, 3, 8, 8, 8), normal(2, 3, 8, 8, 8, seed=1)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    middle = slerp(a, b, 0.5).flatten(1).norm(dim=1)
    torch.testing.assert_close(middle, (a.flatten(1).norm(dim=1) + b.flatten(1).norm(dim=1)) / 2, rtol=0.02, atol=0)
    assert float(((a + b) / 2).flatten(1).norm(dim=1)[0]) < 0.8 * float(middle[0])  # on a straight line it shrinks
    each = slerp(a, b, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(each, torch.stack([a[0], b[1]]))
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    assert slerp(a.float(), b.float(), 0.3).dtype == torch.float32


def test_neighbours_are_interpolated_only_if_both_codes_have_one():
    code, other = Code(normal(4, 3, 8, 8, 8), normal(4, 3, 8, 8, 8, seed=1)), Code(normal(4, 3, 8, 8, 8, seed=2))
    assert code.slerp(other, 0.5).neighbour is None
    pair = code.slerp(Code(other.z, other.z), 0.0)
    torch.testing.assert_close(pair.neighbour, code.neighbour)
    part = code[1:3]
    assert len(part) == 2
    assert torch.equal(part.neighbour, code.neighbour[1:3])


def test_codes_of_different_depths_are_not_interpolated():
    with pytest.raises(UserError, match="depth"):
        Code(normal(2, 4)).slerp(Code(normal(2, 4), depth=0.5), 0.5)


def test_interpolated_codes_of_an_exact_scheme_decode_to_the_scans_at_both_ends():
    schedule, network = linear(), analytic.random_network(2)
    z, sampler = normal(2, 3, 4, 4, 4), Exact()
    code = sampler.invert(network, z, schedule)
    first, second = code[:1], code[1:]
    for share, expected in ((0.0, z[:1]), (1.0, z[1:])):
        torch.testing.assert_close(sampler.sample(network, first.slerp(second, share), schedule), expected)


def test_the_gap_is_zero_for_the_true_noise_and_as_calculated_for_the_best_guess():
    schedule, z0, steps = linear(), normal(500, 4), [1, 100, 500, 999]

    def noise(t: int) -> torch.Tensor:
        return normal(500, 4, seed=t)

    unit = posterior_mean_gap(analytic.Gaussian(schedule, torch.ones(4)), z0, schedule, steps, noise)
    # z_0 given z_t has standard deviation sigma under N(0, 1).
    torch.testing.assert_close(unit.z0_error, schedule.sigma(torch.tensor(steps)), rtol=0.05, atol=0)
    t = torch.tensor(steps)
    a, previous = schedule.alpha_bar[t] / schedule.alpha_bar[t - 1], schedule.alpha_bar[t - 1]
    factor = previous.sqrt() * (1 - a) / (1 - schedule.alpha_bar[t])
    torch.testing.assert_close(unit.gap, factor * unit.z0_error)

    def true_eps(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = analytic.levels(schedule, t)
        return (z_t - alpha * z0) / sigma

    filled = posterior_mean_gap(true_eps, z0, schedule, steps, noise)
    assert filled.rms < 1e-6
    assert unit.filled_share(filled) == pytest.approx(1)
    assert unit.filled_share(unit) == 0


def test_gaussianity_tells_noise_from_shrunk_and_from_uniform_codes():
    noise = measure_gaussianity(normal(200, 3, 6, 6, 6))
    assert abs(noise.mean) < 0.02
    assert noise.std == pytest.approx(1, abs=0.02)
    assert abs(noise.kurtosis) < 0.05
    assert noise.norm_ratio == pytest.approx(1, abs=0.02)
    assert noise.norm_ks < 1.6 / math.sqrt(200)
    shrunk = measure_gaussianity(0.83 * normal(200, 3, 6, 6, 6))
    assert shrunk.std == pytest.approx(0.83, abs=0.02)
    assert shrunk.norm_ks > 0.99
    uniform = measure_gaussianity((torch.rand(50, 3, 6, 6, 6, dtype=torch.float64) - 0.5) * math.sqrt(12))
    assert uniform.kurtosis == pytest.approx(-1.2, abs=0.05)


@pytest.mark.parametrize("file", sorted(CONF.glob("diffusion/*.yaml")), ids=lambda file: file.stem)
def test_diffusion_configs_build(file):
    diffusion = instantiate(OmegaConf.load(file))
    assert diffusion.schedule.timesteps == 1000
    expected = "Velocity" if file.stem.endswith("_v") else "Epsilon"
    assert type(diffusion.parameterisation).__name__ == expected


@pytest.mark.parametrize("name", ["ddim", "published", "multistep", "exact", "ddpm"])
def test_sampler_configs_build(name):
    sampler = instantiate(OmegaConf.load(CONF / "sampler" / f"{name}.yaml"))
    assert sampler.clip is None
    if name == "published":
        assert (sampler.steps, sampler.grid, sampler.end) == (100, "uniform", "published")
        assert type(sampler.guidance.form).__name__ == "Score"
    else:
        assert sampler == type(sampler)()  # the YAML holds the defaults of the class
    assert sampler.with_steps(7).steps == 7


def test_the_default_sampler_and_its_evaluations():
    default = OmegaConf.load(CONF / "sampler" / "default.yaml")
    assert default.defaults == ["multistep"]
    assert Multistep().evaluations == 15
    assert Multistep(steps=10).used_order == 2
    assert DDIM().evaluations == 100
