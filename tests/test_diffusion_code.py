"""Proves the edits on codes (slerp, fresh noise, batches), the diagnostics against distributions with known answers,
and that every diffusion and sampler config builds."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import analytic
from ldae.diffusion.code import Code, concatenate
from ldae.diffusion.diagnostics import measure_gaussianity, posterior_mean_gap
from ldae.diffusion.samplers import DDIM, Exact, Multistep
from ldae.diffusion.schedule import linear
from ldae.diffusion.slerp import slerp
from ldae.utils.errors import UserError

CONF = Path(__file__).parents[1] / "conf"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_slerp_ends_and_norms():
    a, b = normal(2, 3, 8, 8, 8), normal(2, 3, 8, 8, 8, seed=1)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    middle = slerp(a, b, 0.5).flatten(1).norm(dim=1)
    torch.testing.assert_close(middle, (a.flatten(1).norm(dim=1) + b.flatten(1).norm(dim=1)) / 2, rtol=0.02, atol=0)
    assert float(((a + b) / 2).flatten(1).norm(dim=1)[0]) < 0.8 * float(middle[0])  # a straight line shrinks
    each = slerp(a, b, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(each, torch.stack([a[0], b[1]]))
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    assert slerp(a.float(), b.float(), 0.3).dtype == torch.float32


def test_edits_of_a_code():
    code, other = Code(normal(4, 3, 8, 8, 8), normal(4, 3, 8, 8, 8, seed=1)), Code(normal(4, 3, 8, 8, 8, seed=2))
    assert code.slerp(other, 0.5).carried is None
    pair = code.slerp(Code(other.z, code.carried), 0.0)
    torch.testing.assert_close(pair.carried, code.carried)
    assert code.mix(other.z, 0) is code
    mixed = code.mix(other.z, 0.3)
    assert mixed.carried is None
    assert float(mixed.z.std()) == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(code.mix(other.z, 1).z, other.z)
    assert len(code[1:3]) == 2
    joined = concatenate([code[:1], code[1:]])
    assert torch.equal(joined.z, code.z)
    assert torch.equal(joined.carried, code.carried)
    with pytest.raises(UserError, match="depth"):
        code.slerp(Code(other.z, depth=0.5), 0.5)
    with pytest.raises(UserError, match="joined"):
        concatenate([code, other])


def test_interpolated_exact_codes_start_and_end_at_the_scans():
    schedule, network = linear(), analytic.random_network(2)
    z, sampler = normal(2, 3, 4, 4, 4), Exact()
    code = sampler.invert(network, z, schedule)
    first, second = code[:1], code[1:]
    for share, expected in ((0.0, z[:1]), (1.0, z[1:])):
        torch.testing.assert_close(sampler.sample(network, first.slerp(second, share), schedule), expected)


def test_gap_is_none_with_the_truth_and_known_without():
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

    def knowing(z_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = analytic.levels(schedule, t)
        return (z_t - alpha * z0) / sigma

    filled = posterior_mean_gap(knowing, z0, schedule, steps, noise)
    assert filled.rms < 1e-6
    assert unit.filled_share(filled) == pytest.approx(1)
    assert unit.filled_share(unit) == 0


def test_gaussianity_knows_noise_from_what_is_not():
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
        assert sampler == type(sampler)()  # the YAML says what the class does
    assert sampler.with_steps(7).steps == 7


def test_the_default_sampler_is_the_measured_one():
    default = OmegaConf.load(CONF / "sampler" / "default.yaml")
    assert default.defaults == ["multistep"]
    assert Multistep().evaluations == 15
    assert Multistep(steps=10).used_order == 2
    assert DDIM().evaluations == 100
