"""Tests the image metrics by identities, by hand and against MONAI; the brain mask; and soft volumes."""

import numpy as np
import pytest
import torch

from ldae.evaluation.edits.anatomy import Levels, SoftVolume
from ldae.evaluation.images import image_metrics as metrics


@pytest.fixture
def pair():
    """Smooth volumes in [0, 1], and the same with noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(torch.rand(2, 1, 6, 7, 5, generator=generator), (26, 30, 22), mode="trilinear")
    return x, (x + 0.05 * torch.randn(x.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize("width", [11, 7, 3])
def test_ssim_equals_monais_where_definitions_agree(pair, width):
    from monai.metrics import SSIMMetric

    x, y = pair
    expected = SSIMMetric(3, data_range=1.0, win_size=width, kernel_sigma=1.5)(x, y).flatten()
    torch.testing.assert_close(metrics.ssim(x, y, width=width), expected, atol=2e-5, rtol=0)


def test_ssim_of_constants_by_hand():
    """Without structure only the luminance term remains: (2ab + C1) / (a^2 + b^2 + C1)."""
    x, y = torch.full((1, 1, 14, 14, 14), 0.2), torch.full((1, 1, 14, 14, 14), 0.6)
    expected = (2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)
    assert float(metrics.ssim(x, y)) == pytest.approx(expected, abs=1e-4)
    everywhere = torch.ones_like(x, dtype=torch.bool)
    assert float(metrics.ssim(x, y, everywhere)) == pytest.approx(expected, abs=1e-4)


def test_identical_volumes(pair):
    x, _ = pair
    found = metrics.compare_images(x, x)
    for name in ("ssim", "ssim_mask", "ssim_published", "ms_ssim"):
        torch.testing.assert_close(found[name], torch.ones(2), atol=1e-5, rtol=0)
    assert (found["mse"] == 0).all()


def test_every_metric_is_worse_for_more_noise_and_symmetric(pair):
    x, y = pair
    worse = (x + 3 * (y - x)).clamp(0, 1)
    mask = torch.ones_like(x, dtype=torch.bool)
    near, far = metrics.compare_images(y, x, mask), metrics.compare_images(worse, x, mask)
    for name in near:
        sign = -1 if name.startswith("mse") else 1
        assert (sign * (near[name] - far[name]) > 0).all(), name
        torch.testing.assert_close(near[name], metrics.compare_images(x, y, mask)[name], msg=name)


def test_errors_by_hand():
    x = torch.zeros(1, 1, 12, 12, 12)
    y = x.clone()
    y[..., :6] = 0.1
    mask = torch.zeros_like(x, dtype=torch.bool)
    mask[..., :3] = True
    assert float(metrics.mse(x, y)) == pytest.approx(0.005)
    assert float(metrics.psnr(x, y, mask)) == pytest.approx(20, abs=1e-4)


def test_background_raises_ssim_of_the_whole_volume_but_not_in_the_mask():
    generator = torch.Generator().manual_seed(1)
    x = torch.zeros(1, 1, 32, 32, 32)
    x[..., 10:22, 10:22, 10:22] = 0.3 + 0.5 * torch.rand(12, 12, 12, generator=generator)
    y = x.clone()
    y[..., 10:22, 10:22, 10:22] += 0.15 * torch.randn(12, 12, 12, generator=generator)
    found = metrics.compare_images(y, x)
    assert float(found["ssim_mask"]) < float(found["ssim"]) - 0.1


def test_samples_of_a_batch_are_independent(pair):
    x, y = pair
    together = metrics.compare_images(y, x)
    for name, values in metrics.compare_images(y[1:], x[1:]).items():
        torch.testing.assert_close(values, together[name][1:], msg=name)


@pytest.mark.parametrize("shape", [(5, 6, 7), (8, 8, 8), (24, 24, 24)])
def test_small_volumes_are_measured_too(shape):
    x = torch.rand(1, 1, *shape)
    found = metrics.compare_images(x, x * 0.9, torch.ones_like(x, dtype=torch.bool))
    assert all(bool(torch.isfinite(values).all()) for values in found.values())


def test_a_perceptual_distance_is_computed_per_scan(pair):
    x, y = pair
    found = metrics.compare_images(y, x, perceptual=lambda a, b: (a - b).abs().mean())
    torch.testing.assert_close(found["lpips"], (y - x).abs().flatten(1).mean(1))


def test_the_mask_contains_ventricles_but_no_specks():
    x = torch.zeros(2, 1, 20, 20, 20)
    x[:, :, 4:16, 4:16, 4:16] = 0.6
    x[:, :, 8:12, 8:12, 8:12] = 0.0  # ventricles
    x[:, :, 0, 0, 0] = 1.0  # a speck
    x[1] = 0
    x[1, :, :, :10] = 0.5  # touches the border
    mask = metrics.brain_mask(x)
    assert mask.dtype == torch.bool
    assert int(mask[0].sum()) == 12**3
    assert bool(mask[0, 0, 10, 10, 10])
    assert not bool(mask[0, 0, 0, 0, 0])
    assert int(mask[1].sum()) == 20 * 10 * 20


def test_a_mask_is_computed_once_per_scan(monkeypatch):
    """Ten rows requested twice, in another order and other batches: ten masks, each of its own scan."""
    x = torch.nn.functional.interpolate(torch.rand(10, 1, 4, 4, 4), scale_factor=3, mode="trilinear") - 0.4
    expected, made, make = metrics.brain_mask(x), [], metrics.brain_mask
    assert len(expected.flatten(1).unique(dim=0)) == 10
    monkeypatch.setattr(metrics, "brain_mask", lambda x: made.append(len(x)) or make(x))
    masks = metrics.BrainMasks()
    assert torch.equal(masks(x, range(10)), expected)
    order = torch.tensor([7, 2, 2, 9])
    unread = torch.full((4, 1, 12, 12, 12), torch.nan)
    assert torch.equal(masks(unread, order.tolist()), expected[order])
    assert sum(made) == 10


def test_both_ssims_come_from_one_map(pair):
    x, y = pair
    mask = x > 0.5
    whole, inside = metrics.ssim_whole_and_masked(y, x, mask)
    assert torch.equal(whole, metrics.ssim(y, x))
    assert torch.equal(inside, metrics.ssim(y, x, mask))


def test_numbers_are_copied_to_the_host_unchanged():
    values = {
        ("a", 1): torch.rand(3),
        "b": torch.rand(3, requires_grad=True).bfloat16(),
        "c": torch.ones(3).double() / 3,
    }
    found = metrics.copy_to_host(values)
    assert list(found) == list(values)
    for name, value in values.items():
        assert found[name].dtype == np.float64
        assert found[name].tolist() == value.tolist()


def test_no_metric_reads_a_value_back():
    """Fake tensors have no values: reading one raises."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    with FakeTensorMode():
        x, y = torch.rand(2, 1, 16, 18, 16), torch.rand(2, 1, 16, 18, 16)
        found = metrics.compare_images(x, y, x > 0.5, perceptual=lambda a, b: (a - b).abs().mean())
        assert {tuple(values.shape) for values in found.values()} == {(2,)}
        with pytest.raises(DataDependentOutputException):
            float(found["ssim"].mean())


def ball(radius, shape=(24, 24, 24), fine=3):
    """Fraction of each voxel inside a ball, (X, Y, Z)."""
    axes = [(np.arange(n * fine) + 0.5) / fine - n / 2 for n in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    inside = (np.linalg.norm(grid, axis=0) < radius).astype(float)
    return inside.reshape(24, fine, 24, fine, 24, fine).mean((1, 3, 5))


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.7), (0.9, 0.5)])
def test_a_soft_volume_is_the_true_one_whatever_the_intensities(low, high):
    """Levels are found by least squares; partial voxels count by their fraction."""
    measure = SoftVolume(ball(9) > 0, voxel_mm3=8.0)
    reference = ball(4)
    levels = measure.levels(high + (low - high) * reference, reference)
    assert (levels.inside, levels.outside) == (pytest.approx(low), pytest.approx(high))
    for radius in (2.5, 4.0, 6.0):
        share = ball(radius)
        assert measure.measure(high + (low - high) * share, levels) == pytest.approx(8 * share.sum(), rel=1e-6)


def test_a_structure_without_contrast_has_no_volume():
    measure = SoftVolume(ball(9) > 0, voxel_mm3=8.0)
    assert np.isnan(measure.measure(ball(4), Levels(0.5, 0.5)))
