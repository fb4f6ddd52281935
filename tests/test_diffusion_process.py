"""Coefficients of diffusion and guidance: schedules are pinned and decrease, conversions are inverse to each other in
float64, guidance forms are pinned and agree with the loss of stage 3, and a zero gradient changes no bit."""

import math

import pytest
import torch

from ldae.diffusion import guidance, process
from ldae.diffusion.schedule import Schedule, cosine, linear, scaled_linear
from ldae.utils.errors import UserError

SCHEDULES = [linear(), scaled_linear(), cosine()]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_bar_decreases_in_float64(schedule):
    assert schedule.alpha_bar.dtype == torch.float64
    assert schedule.timesteps == 1000
    assert bool((schedule.alpha_bar.diff() < 0).all())


def test_alpha_bar_is_pinned():
    assert float(linear().alpha_bar[0]) == pytest.approx(0.9999, abs=1e-12)
    assert float(linear().alpha_bar[999]) == pytest.approx(4.0358e-5, rel=1e-4)
    assert float(scaled_linear().alpha_bar[0]) == pytest.approx(1 - 0.0015, abs=1e-12)
    middle = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert float(cosine().alpha_bar[499]) == pytest.approx(middle, rel=1e-9)


def test_fractional_timesteps_interpolate_the_logarithm():
    schedule = linear()
    t = torch.tensor([-1.0, -0.5, 10.25, 999.0], dtype=torch.float64)
    log = schedule.alpha_bar.log()
    expected = torch.stack([log[0] * 0, log[0] / 2, log[10] * 0.75 + log[11] * 0.25, log[999]])
    torch.testing.assert_close(schedule.log_alpha_bar(t), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.from_numpy(schedule.timestep_of(expected.numpy())), t)
    assert float(schedule.alpha(-1)) == 1
    assert float(schedule.snr(-1)) == math.inf


def test_a_schedule_that_does_not_decrease_is_refused():
    with pytest.raises(UserError, match="decrease"):
        Schedule(torch.tensor([0.9, 0.9, 0.5]))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_conversions_are_inverse(schedule):
    t = torch.tensor([0, 1, 250, 700, 990])
    z0, noise = normal(5, 3, 2, 2, 2), normal(5, 3, 2, 2, 2, seed=1)
    z_t = process.add_noise(schedule, z0, noise, t)
    v = process.Velocity().target(schedule, z0, noise, t)
    values = {"eps": noise, "z0": z0, "v": v}
    for source, value in values.items():
        for target, expected in values.items():
            if source != target:
                convert = getattr(process, f"{source}_to_{target}")
                torch.testing.assert_close(convert(schedule, value, z_t, t), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("parameterisation", [process.Epsilon(), process.Velocity()])
def test_the_target_of_each_parameterisation_converts_to_the_noise(parameterisation):
    schedule, t = linear(), torch.tensor([0, 400, 999])
    z0, noise = normal(3, 3, 2, 2, 2), normal(3, 3, 2, 2, 2, seed=1)
    z_t = process.add_noise(schedule, z0, noise, t)
    output = parameterisation.target(schedule, z0, noise, t)
    torch.testing.assert_close(parameterisation.to_eps(schedule, output, z_t, t), noise)


def test_results_keep_the_dtype_of_the_latent():
    z = torch.ones(2, 3, 2, 2, 2)
    assert process.add_noise(linear(), z, z, torch.tensor([3, 5])).dtype == torch.float32
    assert process.eps_to_v(linear(), z, z, torch.tensor([3.5, 5])).dtype == torch.float32


def test_loss_weight_is_snr_power_over_one_plus_snr():
    schedule, t = linear(), torch.tensor([0, 300, 999])
    snr = schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])
    torch.testing.assert_close(process.loss_weight(schedule, t), snr**0.1 / (1 + snr), rtol=1e-10, atol=0)


def test_posterior_coefficient_is_pinned():
    schedule, t = linear(), torch.tensor([0, 1, 20, 100, 999])
    c = guidance.Posterior().coefficient(schedule, t)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alpha_bar])[t]
    a = schedule.alpha_bar[t] / previous
    torch.testing.assert_close(c, -a.sqrt() * (1 - previous) / (1 - schedule.alpha_bar[t]).sqrt())
    assert c.tolist() == pytest.approx([0, -0.00674301, -0.07287025, -0.3176906, -0.9899287], rel=1e-6)
    share = guidance.Posterior().coefficient(schedule, torch.tensor([0, 1, 19])) / -schedule.sigma(
        torch.tensor([0, 1, 19])
    )
    assert share.tolist() == pytest.approx([0, 0.45, 0.92], abs=0.005)


def test_forms_agree_from_t_100_and_drop_g_at_t_0():
    schedule, t = linear(), torch.arange(100, 1000)
    posterior, score = guidance.Posterior().coefficient(schedule, t), guidance.Score().coefficient(schedule, t)
    torch.testing.assert_close(posterior, score, rtol=0.02, atol=0)
    for form in (guidance.Posterior(), guidance.Score()):
        assert form.coefficient(schedule, torch.tensor([-1.0, -0.5, 0.0])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("parameterisation", [process.Epsilon(), process.Velocity()])
def test_the_trained_form_adds_g_as_the_loss_of_stage_3_does(parameterisation):
    schedule, t = linear(), torch.tensor([0, 7, 500, 999])
    output, gradient, z_t = (normal(4, 3, 2, 2, 2, seed=i) for i in range(3))
    k = parameterisation.gap_coefficient(schedule, t).view(-1, 1, 1, 1, 1)
    trained = parameterisation.to_eps(schedule, output + k * gradient, z_t, t)

    def eps_fn(z, t):
        return parameterisation.to_eps(schedule, output, z, t)

    guided = guidance.GuidedEps(eps_fn, lambda z, t: (eps_fn(z, t), gradient), parameterisation.trained_form, schedule)
    torch.testing.assert_close(guided(z_t, t), trained, rtol=1e-10, atol=1e-10)
    assert parameterisation.gap_weight(schedule, t).shape == (4,)


@pytest.mark.parametrize("form", [guidance.Posterior(), guidance.Score(), guidance.VelocityShift()])
def test_zero_gradient_changes_nothing_to_the_bit(form):
    schedule, t = linear(), torch.tensor([0.0, 500.5])
    z = torch.randn(2, 3, 2, 2, 2)

    def eps_and_gradient(z, t):
        return z * 0.3, torch.zeros_like(z)

    guided = guidance.GuidedEps(lambda z, t: z * 0.3, eps_and_gradient, form, schedule, strength=2.5)
    assert torch.equal(guided(z, t), z * 0.3)


def test_strength_scales_and_stop_drops_guidance():
    schedule, z, calls = linear(), torch.ones(2, 1, 1, 1, 1, dtype=torch.float64), []

    def eps_and_gradient(z, t):
        calls.append(t)
        return z, torch.ones_like(z)

    form = guidance.VelocityShift()
    eps_fn = guidance.GuidedEps(lambda z, t: z, eps_and_gradient, form, schedule, strength=2, stop=0.3)
    assert torch.equal(eps_fn.at(299.0)(z, torch.tensor([299.0, 299.0])), z)
    assert not calls, "below `stop`, G is not computed"
    assert eps_fn.at(300.0) is eps_fn
    assert (
        guidance.GuidedEps(lambda z, t: z, eps_and_gradient, form, schedule, strength=0).at(999.0)(z, torch.ones(2))
        is z
    )
    assert torch.equal(eps_fn(z, torch.tensor([0.0, 299.0])), z)
    mixed = eps_fn(z, torch.tensor([299.0, 300.0])).flatten()
    assert float(mixed[0]) == 1
    assert float(mixed[1]) == pytest.approx(1 + 2 * float(schedule.alpha(300)))
