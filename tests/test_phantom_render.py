"""Proves that phantoms are diffeomorphic deformations of the template with the target volumes, and that a
counterfactual changes the anatomy only."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import norm

from ldae.data.phantom import render, render_labels
from ldae.data.phantom.anatomy import GRID, draw_shape_field, load_fields, region_maps
from ldae.data.phantom.deform import exponentiate, sample_maps
from ldae.data.phantom.rendering import compute_deformation, find_factors
from ldae.data.phantom.subjects import draw_subject, draw_table, table_row, target_volumes
from ldae.data.phantom.template_maps import load_template

SEED = 11
COARSE = {"spacing": 9.0, "shape": (24, 28, 24)}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def jacobian_determinant(displacement, spacing):
    """Determinant of the Jacobian of x -> x + u(x), (X, Y, Z), by central differences."""
    rows = [torch.stack(torch.gradient(component, spacing=spacing)) for component in displacement]
    return torch.linalg.det(torch.stack(rows).movedim((0, 1), (-2, -1)) + torch.eye(3))


def test_the_exponential_of_a_linear_field_is_the_analytic_one():
    # v = a x on every axis: exp(v) = e^a x, and its Jacobian is e^(3 a).
    base = load_template(3)
    points, extent = base.points(), base.extent
    displacement = exponentiate(0.1 * points.movedim(-1, 0), points, extent)
    inner = (slice(None), slice(10, -10), slice(10, -10), slice(10, -10))
    expected = (np.exp(0.1) - 1) * points.movedim(-1, 0)
    assert torch.allclose(displacement[inner], expected[inner], atol=0.002)
    middle = jacobian_determinant(displacement, 3)[12:-12, 12:-12, 12:-12]
    assert torch.allclose(middle, torch.full_like(middle, float(np.exp(0.3))), rtol=5e-3)


def test_deformations_are_invertible_with_positive_jacobian():
    fields = load_fields()
    table = draw_table(60, SEED)
    extremes = [table.ventricle_mm3.idxmax(), table.hippocampus_mm3.idxmin(), table.brain_mm3.idxmin()]
    for index in [*extremes, 0]:
        displacement, _ = compute_deformation(find_factors((SEED, *table.loc[index, ["subject", "session"]])))
        assert jacobian_determinant(displacement, GRID).min() > 0
    shape = draw_shape_field(5)
    strengths = np.array([6.0, 1.0, 5.0])
    there, back = (fields.displacement(strengths, shape, sign) for sign in (1, -1))
    moved = fields.points + there.movedim(0, -1)
    returned = moved + sample_maps(back, moved, fields.extent, "border").movedim(0, -1)
    assert (returned - fields.points)[fields.head > 0.5].norm(dim=-1).quantile(0.99) < 0.5


def test_rendered_volumes_are_the_target_volumes():
    errors = []
    for subject in range(1, 9):
        factors = draw_subject(SEED, subject)[-1]
        rendered, targets = render(factors, **COARSE).volumes, target_volumes(factors)
        errors.append(
            [np.log(rendered[name] / targets[name]) for name in ("ventricle", "hippocampus", "brain", "head")]
        )
    assert np.abs(errors).max(0) == pytest.approx(0, abs=0.06)
    assert np.abs(errors).max(0)[2:] == pytest.approx(0, abs=0.02)


def test_volumes_and_intensities_do_not_depend_on_the_voxel_size():
    fine = render((SEED, 2, 0), spacing=3.0, shape=(60, 72, 60))
    coarse = render((SEED, 2, 0), **COARSE)
    assert coarse.volumes == pytest.approx(fine.volumes, rel=0.02)
    fine, coarse = (
        render((SEED, 2, 0), noise=False, spacing=s, shape=n).image for s, n in ((3, (60, 72, 60)), (9, (20, 24, 20)))
    )
    averaged = fine.reshape(20, 3, 24, 3, 20, 3).mean((1, 3, 5))
    inside = (coarse > 0) & (fine.reshape(20, 3, 24, 3, 20, 3).min((1, 3, 5)) > 0)
    assert inside.sum() > 1000
    assert np.abs(averaged - coarse)[inside].max() < 0.06 * coarse.max()
    assert np.abs(averaged - coarse)[inside].mean() < 0.01 * coarse.max()


def test_the_scan_is_a_centred_skull_stripped_ras_brain():
    import nibabel

    scan = render((SEED, 1, 0))
    assert nibabel.aff2axcodes(scan.affine) == ("R", "A", "S")
    assert ((scan.image > 0) == (scan.labels > 0)).all()
    assert set(np.unique(scan.labels)) == {0, 1, 47, 48, 51, 52}
    where = np.argwhere(scan.labels > 0)
    assert np.abs((where.min(0) + where.max(0)) / 2 - (np.array(scan.image.shape) - 1) / 2).max() < 2.5
    assert where.min() > 0
    # Right has the larger first index, and the hippocampi are below the ventricles.
    centres = {label: np.argwhere(scan.labels == label).mean(0) for label in (47, 48, 51, 52)}
    assert centres[47][0] > centres[48][0]
    assert centres[51][0] > centres[52][0]
    assert centres[47][2] < centres[51][2]
    ventricle = scan.image[np.isin(scan.labels, (51, 52))].mean()
    assert ventricle < 0.7 * scan.image[scan.labels == 1].mean()


def test_counterfactuals_change_the_anatomy_only():
    key = (SEED, 4, 0)
    scans = [render(key, severity=value) for value in (0.0, 0.5, 1.0)]
    older = render(key, age=85.0, severity=0.0)
    for less, more in [*pairwise(scans), (render(key, age=65.0, severity=0.0), older)]:
        assert more.volumes["ventricle"] > 1.05 * less.volumes["ventricle"]
        assert more.volumes["hippocampus"] < 0.99 * less.volumes["hippocampus"]
        assert more.volumes["brain"] < less.volumes["brain"]
        assert more.volumes["head"] == pytest.approx(less.volumes["head"], rel=0.01)
    healthy, sick = scans[0], scans[2]
    noise = [scan.image - render(key, severity=s, noise=False).image for scan, s in ((healthy, 0.0), (sick, 1.0))]
    both = (healthy.image > 0) & (sick.image > 0) & (healthy.labels == 1) & (sick.labels == 1)
    assert np.corrcoef(noise[0][both], noise[1][both])[0, 1] > 0.97
    assert both.sum() > 0.95 * (healthy.labels == 1).sum()
    assert (render_labels(key, severity=1.0) == sick.labels).all()
    factors = find_factors(key)
    assert (render(key).image == render(key, severity=factors.severity, age=factors.age).image).all()


def csf_behind_and_in_front(factors):
    """CSF outside the ventricles in mm3, in the posterior and anterior half of the deformed maps."""
    displacement, scale = compute_deformation(factors)
    fields = load_fields()
    ventricle, _, brain, head = sample_maps(
        region_maps(load_template(GRID)), fields.points + displacement.movedim(0, -1), fields.extent
    )
    fluid, behind = head - brain - ventricle, fields.points[..., 1] < 0
    return (torch.stack([fluid[behind].sum(), fluid[~behind].sum()]) * GRID**3 * scale.prod()).numpy()


def test_sulci_widen_in_front_with_age_and_at_the_back_with_disease():
    healthy = replace(draw_subject(SEED, 3)[0], age=65.0, severity=0.0)
    start, older, sick = map(csf_behind_and_in_front, (healthy, healthy.changed(age=80.0), healthy.changed(1.0)))
    behind, front = older - start
    assert front > 1.5 * max(behind, 0)
    behind, front = sick - start
    assert behind > 1.5 * max(front, 0)
    # The factor that moves the widening to the back does not change the volumes.
    other = replace(healthy, posterior=healthy.posterior + 1)
    moved = csf_behind_and_in_front(other) - start
    assert moved[0] > 500 > -500 > moved[1]
    volumes = [render(factors, **COARSE).volumes for factors in (healthy, other)]
    assert volumes[1] == pytest.approx(volumes[0], rel=0.02)


def test_a_key_is_a_row_or_seed_subject_session():
    table = draw_table(3, SEED)
    last = table.iloc[-1]
    assert find_factors(last) == find_factors((SEED, 3, last.session)) == draw_subject(SEED, 3)[-1]
    assert table_row(find_factors(last), target_volumes(find_factors(last))) == last.to_dict()
    with pytest.raises(KeyError, match="no session at 7 months"):
        find_factors((SEED, 3, "ses-M007"))


def test_mean_intensity_hardly_predicts_the_diagnosis():
    # The same subjects as a typical healthy and as a typical demented person: this needs fewer scans than two groups.
    means = {0.08: [], 1.0: []}
    for subject in range(1, 21):
        for severity, age in ((0.08, 69.5), (1.0, 73.5)):
            image = render(draw_subject(SEED, subject)[0], severity=severity, age=age, **COARSE).image
            low, high = np.percentile(image[image > 0], [0.5, 99.5])
            scaled = np.clip((image - low) / (high - low), 0, 1)
            means[severity].append((scaled.mean(), scaled[image > 0].mean()))
    healthy, sick = (np.array(group) for group in means.values())
    difference = np.abs(sick.mean(0) - healthy.mean(0)) / np.sqrt((sick.var(0) + healthy.var(0)) / 2)
    # The AUC of two normal distributions whose means differ by this number of standard deviations.
    assert (norm.cdf(difference / np.sqrt(2)) <= 0.65).all()
