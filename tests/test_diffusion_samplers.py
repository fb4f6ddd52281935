"""Samplers on networks whose probability flow is known: orders of convergence of sampling and inversion, exact
inversion, numbers of evaluations, partial and renoised inversion, and the known error of DDIM on unit Gaussians."""

from functools import cache

import numpy as np
import pytest
import torch

import analytic
from ldae.diffusion.code import Code
from ldae.diffusion.grids import GRIDS, Path, make_path
from ldae.diffusion.guidance import GuidedEps, Posterior
from ldae.diffusion.samplers import DDIM, DDPM, Exact, Multistep
from ldae.diffusion.schedule import cosine, linear, scaled_linear
from ldae.utils.errors import UserError

LINEAR = linear()
STEPS = (40, 80, 160)
SOLVERS = {
    "ddim": (DDIM(grid="balanced"), 1, 1.25),
    "adams_bashforth_2": (Multistep(order=2, corrector=False), 2, 2.5),
    "predictor_corrector_2": (Multistep(order=2), 2, 3.3),  # its leading error is small: it falls faster at first
    "predictor_corrector_3": (Multistep(order=3), 3, 4.5),
    "exact": (Exact(), 2, 2.6),
}


def gaussian() -> analytic.Gaussian:
    return analytic.Gaussian(LINEAR, torch.tensor([0.3, 0.6, 1.0, 1.8]))


def mixture() -> analytic.Mixture:
    means = torch.tensor([[1.0, 0.3, 0.0, -0.5], [-1.0, -0.3, 0.0, 0.5]])
    return analytic.Mixture(LINEAR, means, torch.tensor([0.4, 0.6, 1.0, 0.8]))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slope(errors: list[float], steps: tuple[int, ...] = STEPS) -> float:
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


def rms(value: torch.Tensor) -> float:
    return float(value.square().mean().sqrt())


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("grid", ["balanced", "angle"])
def test_order_on_a_gaussian_both_ways(name, grid):
    sampler, order, at_most = SOLVERS[name]
    eps_fn, z = gaussian(), normal(32, 4)
    # On this grid two error terms of the corrected inversion cancel near 40 steps, and its slope settles only later.
    counts = (160, 320, 640) if grid == "balanced" and name.startswith("predictor") else STEPS
    sampling, inversion = [], []
    for steps in counts:
        solver = type(sampler)(**{**vars(sampler), "steps": steps, "grid": grid, "end": "published"})
        up = solver.path(LINEAR)
        sampling.append(rms(solver.sample(eps_fn, z, LINEAR) - eps_fn.flow(z, up.reversed())))
        inversion.append(rms(solver.invert(eps_fn, z, LINEAR).z - eps_fn.flow(z, up)))
    for errors in (sampling, inversion):
        assert order - 0.25 < slope(errors, counts) < at_most, errors


@cache
def mixture_solution(end: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Start, and where sampling and inversion bring it in 600 steps of the third-order solver."""
    fine, z = Multistep(steps=600, end=end), normal(32, 4) * 0.8
    return z, fine.sample(mixture(), z, LINEAR), fine.invert(mixture(), z, LINEAR).z


@pytest.mark.parametrize("name", SOLVERS)
def test_order_on_a_mixture_both_ways(name):
    sampler, order, at_most = SOLVERS[name]
    eps_fn = mixture()
    z, *reference = mixture_solution("published")
    solvers = [type(sampler)(**{**vars(sampler), "end": "published", "steps": steps}) for steps in STEPS]
    sampling = [rms(solver.sample(eps_fn, z, LINEAR) - reference[0]) for solver in solvers]
    inversion = [rms(solver.invert(eps_fn, z, LINEAR).z - reference[1]) for solver in solvers]
    for errors in (sampling, inversion):
        assert order - 0.25 < slope(errors) < at_most, errors


def test_ddim_recovers_a_gaussian():
    std = torch.tensor([0.3, 0.6, 1.0, 1.8])
    samples = DDIM(steps=500).sample(gaussian(), normal(4000, 4), LINEAR)
    torch.testing.assert_close(samples.std(0), std.double(), rtol=0.04, atol=0)


@pytest.mark.parametrize("end", ["closed", "published"])
@pytest.mark.parametrize(("steps", "std"), [(10, 0.83), (20, 0.91), (50, 0.96)])
def test_ddim_shrinks_the_code_of_unit_gaussian_latents_by_the_known_factor(end, steps, std):
    eps_fn = analytic.Gaussian(LINEAR, torch.ones(1))
    one = torch.ones(1, 1, dtype=torch.float64)
    assert float(DDIM(steps=steps, end=end).invert(eps_fn, one, LINEAR).z) == pytest.approx(std, abs=0.006)
    assert float(DDIM(steps=steps, end=end).sample(eps_fn, one, LINEAR)) == pytest.approx(std, abs=0.006)
    assert float(Multistep(steps=steps, end=end).invert(eps_fn, one, LINEAR).z) == pytest.approx(1, abs=3e-3)


@pytest.mark.parametrize("sampler", [DDIM(), Multistep(), Multistep(order=2, corrector=False)])
def test_inversion_and_sampling_return_the_start_with_many_steps(sampler):
    eps_fn, z = mixture(), normal(16, 4) * 0.8

    def error(steps: int) -> float:
        solver = sampler.with_steps(steps)
        return rms(solver.sample(eps_fn, solver.invert(eps_fn, z, LINEAR), LINEAR) - z)

    assert error(160) < 0.6 * error(40)
    assert error(160) < 0.03


def test_default_at_15_steps_beats_ddim_at_100():
    eps_fn = mixture()
    z, exact_sample, exact_code = mixture_solution("closed")
    default, ddim = Multistep(), DDIM(steps=100)
    assert default.steps == 15
    for solver_error, bound in (
        (rms(default.sample(eps_fn, z, LINEAR) - exact_sample), rms(ddim.sample(eps_fn, z, LINEAR) - exact_sample)),
        (rms(default.invert(eps_fn, z, LINEAR).z - exact_code), rms(ddim.invert(eps_fn, z, LINEAR).z - exact_code)),
    ):
        assert solver_error < bound / 2


@pytest.mark.parametrize("schedule", [linear(), scaled_linear(), cosine()])
@pytest.mark.parametrize("end", ["closed", "published"])
def test_exact_inversion_returns_the_start_for_any_network(schedule, end):
    network, z0 = analytic.random_network(0), normal(2, 3, 4, 5, 4)
    sampler = Exact(steps=20, end=end)
    code = sampler.invert(network, z0, schedule)
    assert rms(code.z - z0) > 0.1  # the inversion is not the identity
    scale = float(code.z.abs().max())
    assert float((sampler.sample(network, code, schedule) - z0).abs().max()) < 1e-10 * max(1.0, scale)
    assert rms(sampler.sample(network, Code(code.z), schedule) - z0) > 1e-6  # without the second latent it is not exact


@pytest.mark.parametrize("end", ["closed", "published"])
@pytest.mark.parametrize("sampler", [DDIM(), Multistep(), Exact(), DDPM()])
def test_the_number_of_evaluations_is_that_of_the_steps(sampler, end):
    sampler = type(sampler)(**{**vars(sampler), "steps": 12, "end": end})
    z = normal(2, 4)
    counted = analytic.Counted(gaussian())
    sampler.sample(counted, z, LINEAR)
    assert len(counted.times) == sampler.evaluations == 12
    assert counted.times[0] == 999
    assert min(counted.times) > 0  # at the noise-free end itself the network is not evaluated
    if isinstance(sampler, DDPM):
        return
    counted = analytic.Counted(gaussian())
    sampler.invert(counted, z, LINEAR)
    assert len(counted.times) == 12
    assert counted.times[0] == min(counted.times) == 0  # under either rule the first evaluation is at t = 0
    assert max(counted.times) < 999


def test_sampling_and_inversion_use_the_same_nodes():
    up = make_path(LINEAR, 7, "uniform", "published")
    assert up.times.tolist() == [int(t) for t in np.linspace(0, 999, 8)]
    assert up.alpha[0] ** 2 == pytest.approx(0.9999)
    closed = make_path(LINEAR, 7, "uniform", "closed")
    assert closed.alpha[0] == 1
    assert closed.sigma[0] == 0
    assert closed.reversed().times.tolist() == up.times.tolist()[::-1]
    assert make_path(LINEAR, 1000, "uniform", "closed").times.tolist() == [0, *range(1000)][:1001]


@pytest.mark.parametrize("schedule", [linear(), scaled_linear(), cosine()])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("depth", [0.4, 1.0])
def test_grids_rise_from_0_to_their_depth(schedule, grid, depth):
    path = make_path(schedule, 20, grid, "closed", depth)
    assert path.times[0] == 0
    assert path.times[-1] == pytest.approx(int(depth * 999) if grid == "uniform" else depth * 999)
    assert bool((np.diff(path.times) > 0).all())
    assert bool((np.diff(path.angle) > 0).all())
    even = {"log_snr": np.log(path.alpha[1:] / path.sigma[1:]), "angle": path.angle[1:]}.get(grid)
    if even is not None:
        assert np.diff(even) == pytest.approx(np.diff(even)[0], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"grid": "karras"}, "grid"), ({"end": "open"}, "end"), ({"steps": 0}, "steps"), ({"steps": 1001}, "steps")],
)
def test_bad_settings_are_refused_by_name(settings, name):
    with pytest.raises(UserError, match=name):
        DDIM(**settings).sample(gaussian(), normal(1, 4), LINEAR)
    with pytest.raises(UserError, match="order"):
        Multistep(order=4)
    with pytest.raises(UserError, match="at least 2"):
        Exact(steps=1)
    with pytest.raises(UserError, match="cannot invert"):
        DDPM().invert(gaussian(), normal(1, 4), LINEAR)


@pytest.mark.parametrize("sampler", [DDIM(steps=200), Multistep(steps=40), Exact(steps=40)])
def test_sampling_from_a_partial_inversion_starts_at_its_depth(sampler):
    eps_fn, z = mixture(), normal(16, 4) * 0.8
    code = sampler.invert(eps_fn, z, LINEAR, depth=0.4)
    assert code.depth == 0.4
    assert rms(sampler.sample(eps_fn, code, LINEAR) - z) < 0.02
    assert rms(sampler.sample(eps_fn, Code(code.z), LINEAR) - z) > 0.1  # sampling from full depth misses the start


def test_renoised_inversion_replaces_the_first_steps():
    eps_fn, z, noise = mixture(), normal(16, 4) * 0.8, normal(16, 4, seed=3)
    sampler, counted = Multistep(steps=20), analytic.Counted(mixture())
    code = sampler.invert(counted, z, LINEAR, noise=noise, renoise=0.25)
    path = sampler.path(LINEAR)
    assert counted.times == pytest.approx(path.times[5:20].tolist())
    again = sampler.sample(eps_fn, code, LINEAR)
    assert 0.01 < rms(again - z) < 1
    assert torch.equal(sampler.invert(eps_fn, z, LINEAR, noise=noise, renoise=0).z, sampler.invert(eps_fn, z, LINEAR).z)
    full = sampler.invert(eps_fn, z, LINEAR, noise=noise, renoise=1.0)
    torch.testing.assert_close(full.z, path.alpha[-1] * z + path.sigma[-1] * noise)
    with pytest.raises(UserError, match="renoise"):
        sampler.invert(eps_fn, z, LINEAR, renoise=0.5)


@pytest.mark.parametrize("sampler", [DDIM(steps=10), Multistep(steps=10), Exact(steps=10), DDPM(steps=10)])
def test_zero_gradient_leaves_the_unconditional_sampler_unchanged_to_the_bit(sampler):
    network, z = analytic.random_network(1).float(), torch.randn(2, 3, 4, 4, 4)
    guided = GuidedEps(network, lambda z, t: (network(z, t), torch.zeros_like(z)), Posterior(), LINEAR)
    expected, found = sampler.sample(network, z, LINEAR), sampler.sample(guided, z, LINEAR)
    assert expected.dtype == torch.float32
    assert torch.equal(found, expected)


def test_clipping_is_off_by_default_and_bounds_the_prediction():
    eps_fn, z = analytic.Gaussian(LINEAR, torch.full((4,), 3.0)), normal(64, 4)
    assert float(DDIM(steps=50).sample(eps_fn, z, LINEAR).abs().max()) > 3
    assert float(DDIM(steps=50, clip=1.0).sample(eps_fn, z, LINEAR).abs().max()) <= 1 + 1e-9


def test_ddpm_samples_the_distribution_whatever_the_batch_size():
    samples = DDPM(steps=200).sample(gaussian(), normal(1500, 4), LINEAR)
    torch.testing.assert_close(samples.std(0), gaussian().std, rtol=0.08, atol=0)
    z = normal(3, 4)
    alone, together = DDPM(steps=20).sample(gaussian(), z[:1], LINEAR), DDPM(steps=20).sample(gaussian(), z, LINEAR)
    torch.testing.assert_close(alone, together[:1])


def test_a_path_gives_the_angle_of_each_node_and_can_be_sliced():
    path = Path(np.array([0.0, 10.0]), np.array([0.0, np.log(0.5)]))
    assert path.angle.tolist() == pytest.approx([0, np.pi / 4])
    assert path[1:].times.tolist() == [10]
