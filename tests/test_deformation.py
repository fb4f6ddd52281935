"""Proves that the growth of a structure between two images is found by registration, whatever its contrast."""

import math

import pytest
import torch

from ldae.data.phantom import render
from ldae.evaluation.edits.deformation import jacobian_determinant, measure_growth, register
from small_images import soft_ball

SHAPE = (56, 64, 56)


def test_a_ball_that_grows_is_found_and_an_image_without_change_has_growth_1():
    small, large = soft_ball(6.0), soft_ball(6.6)
    fraction = {"ball": (small[:, 0] > 0.7).float()}
    assert measure_growth(small, small, fraction)["ball"] == pytest.approx(1, abs=1e-3)
    assert measure_growth(small, large, fraction)["ball"].item() == pytest.approx(1.1**3, rel=0.1)
    assert measure_growth(large, small, fraction)["ball"].item() == pytest.approx(1.1**-3, rel=0.1)


def test_brightness_and_contrast_are_no_growth():
    image = soft_ball(6.0)
    fraction = {"ball": (image[:, 0] > 0.7).float()}
    assert measure_growth(image, 0.9 * image + 0.05, fraction)["ball"].item() == pytest.approx(1, abs=1e-3)


def test_each_image_of_a_batch_is_measured_on_its_own_and_an_absent_structure_is_nan():
    before, after = torch.cat([soft_ball(6.0), soft_ball(5.0)]), torch.cat([soft_ball(6.6), soft_ball(5.0)])
    fractions = {"ball": (before[:, 0] > 0.7).float(), "none": torch.zeros(2, 36, 36, 36)}
    growth = measure_growth(before, after, fractions)
    alone = measure_growth(before[:1], after[:1], {"ball": fractions["ball"][:1]})["ball"]
    assert growth["ball"][0] == pytest.approx(alone.item(), abs=0.03)
    assert growth["ball"][1] == pytest.approx(1, abs=0.01)
    assert all(math.isnan(value) for value in growth["none"])


def test_a_displacement_that_enlarges_has_the_determinant_of_the_enlargement():
    axes = torch.stack(torch.meshgrid(*[torch.arange(6.0)] * 3, indexing="ij"))[None]
    assert torch.allclose(jacobian_determinant(0.1 * axes), torch.tensor(1.1**3), atol=1e-4)


def test_the_registered_image_resembles_the_fixed_one():
    displacement = register(soft_ball(6.0), soft_ball(6.6))
    assert displacement.shape == (1, 3, 36, 36, 36)
    assert displacement.isfinite().all()


def test_the_hippocampi_of_a_true_counterfactual_shrink_and_the_ventricles_grow():
    scans = [render((7, 2, 0), severity=severity, spacing=3.0, shape=SHAPE, noise=False) for severity in (0.0, 1.0)]
    before, after = (torch.from_numpy(scan.image / scans[0].image.max())[None, None] for scan in scans)
    labels = torch.from_numpy(scans[0].labels)
    fractions = {
        "ventricle": torch.isin(labels, torch.tensor([51, 52], dtype=torch.uint8))[None].float(),
        "hippocampus": torch.isin(labels, torch.tensor([47, 48], dtype=torch.uint8))[None].float(),
    }
    growth = measure_growth(before, after, fractions)
    for name in fractions:
        true = scans[1].volumes[name] / scans[0].volumes[name] - 1
        assert 0.6 < (growth[name].item() - 1) / true < 1.25
