"""Proves that three tissues are found in known mixtures, and that a scan without three is refused in one line."""

import numpy as np
import pytest

from ldae.data.tissue_mixture import Divisions, TissuesNotFound, fit_tissues
from ldae.data.tissues import Mixture, PartialVolume, Ramps, SoftSegmentation
from ldae.utils.errors import UserError

MEANS, SDS, SHARES = np.array([30.0, 70.0, 100.0]), np.array([8.0, 6.0, 4.0]), np.array([0.15, 0.5, 0.35])


def draw(count: int = 60_000, means=MEANS, sds=SDS, shares=SHARES, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Intensities of a mixture (N,), and the tissue that each is of."""
    generator = np.random.default_rng(seed)
    tissue = generator.choice(3, count, p=shares)
    return np.maximum(generator.normal(means[tissue], sds[tissue]), 1), tissue


def brain(values: np.ndarray) -> np.ndarray:
    """A brain (40, 50, 40) of these intensities in a background of 0."""
    volume = np.zeros((40, 50, 40), np.float32)
    volume.reshape(-1)[5000 : 5000 + len(values)] = values
    return volume


def test_the_mixture_of_known_gaussians_is_found():
    found = fit_tissues(draw()[0], Divisions.pure())
    np.testing.assert_allclose(found.means, MEANS, atol=0.6)
    np.testing.assert_allclose(found.sds, SDS, atol=0.5)
    np.testing.assert_allclose(found.shares, SHARES, atol=0.02)


@pytest.mark.parametrize("shares", [(0.04, 0.56, 0.4), (0.4, 0.4, 0.2), (0.1, 0.2, 0.7)])
@pytest.mark.parametrize("divisions", [Divisions.pure(), Divisions.shared(3)])
def test_it_is_found_whatever_the_shares(shares, divisions):
    np.testing.assert_allclose(fit_tissues(draw(shares=np.array(shares))[0], divisions).means, MEANS, atol=5)


def draw_partial_volumes(count: int = 60_000) -> tuple[np.ndarray, np.ndarray]:
    """Intensities of voxels of which two thirds are shared by two neighbouring tissues, and fractions (3, N)."""
    generator = np.random.default_rng(0)
    kind, part = generator.choice(5, count, p=[0.05, 0.1, 0.15, 0.3, 0.4]), generator.uniform(size=count)
    fractions = np.zeros((3, count))
    for tissue in range(3):
        fractions[tissue, kind == tissue] = 1
    for pair in range(2):
        shared = kind == 3 + pair
        fractions[pair, shared], fractions[pair + 1, shared] = 1 - part[shared], part[shared]
    return MEANS @ fractions + generator.normal(0, 4, count), fractions


def test_pure_tissues_are_found_where_most_voxels_are_shared():
    values, fractions = draw_partial_volumes()
    found, plain = (fit_tissues(values, divisions) for divisions in (Divisions.shared(3), Divisions.pure()))
    np.testing.assert_allclose(found.means, MEANS, atol=3)
    np.testing.assert_allclose(found.sds, 4, atol=1.5)
    np.testing.assert_allclose(found.shares, fractions.mean(1), atol=0.03)
    errors = [np.abs(mixture.fractions_at(values) - fractions).mean() for mixture in (found, plain)]
    assert errors[0] < 0.07
    assert errors[1] > 1.5 * errors[0]


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (lambda values: np.rint(values / 4) * 4, 0.02),  # a scan of few integers
        (lambda values: values * 1e-3, 0.01),
        (lambda values: values * 37 + 500, 0.01),
        (lambda values: np.append(values, [1e5] * 20), 0.01),  # a few voxels of fat
    ],
)
@pytest.mark.parametrize("maker", [SoftSegmentation(), PartialVolume(), Mixture()])
def test_the_maps_do_not_depend_on_the_scale_quantisation_or_outliers(change, tolerance, maker):
    values, _ = draw()
    plain, changed = maker(brain(values)), maker(brain(change(values)))
    inside = plain.values.sum(0) > 0
    assert np.abs(plain.values - changed.values)[:, inside][:, : len(values)].mean() < tolerance


@pytest.mark.parametrize("maker", [SoftSegmentation(), PartialVolume(), Mixture()])
def test_fractions_sum_to_one_in_the_brain_and_name_the_tissue(maker):
    values, tissue = draw()
    maps = maker(brain(values))
    inside = maps.values.reshape(3, -1)[:, 5000 : 5000 + len(values)]
    np.testing.assert_allclose(inside.sum(0), 1, atol=1e-5)
    assert (inside.argmax(0) == tissue).mean() > 0.93
    assert maps.values.sum() == pytest.approx(len(values), rel=1e-5)
    assert not maps.notes


@pytest.mark.parametrize("maker", [SoftSegmentation(), PartialVolume(), Mixture()])
def test_the_brightest_and_darkest_voxels_belong_to_the_outer_tissues(maker):
    values = np.concatenate([draw()[0], [2.0, 130.0, 400.0]])
    maps = maker(brain(values)).values.reshape(3, -1)[:, 5000 + len(values) - 3 : 5000 + len(values)]
    assert maps[0, 0] > 0.95
    assert (maps[2, 1:] > 0.95).all()


def test_ramps_rise_between_the_means_of_the_tissues():
    values = np.concatenate([draw()[0], MEANS, [85.0, 3.0]])
    ramps = Ramps()(brain(values)).values.reshape(2, -1)[:, 5000 + len(values) - 5 : 5000 + len(values)]
    np.testing.assert_allclose(ramps, [[0, 1, 1, 1, 0], [0, 0, 1, 0.5, 0]], atol=0.08)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.full(5000, 7.0), "one intensity"),
        (np.arange(1.0, 100.0), "99 voxels"),
        (np.repeat([1.0, 2.0], 4000), "2 intensities"),
        (np.zeros(0), "0 voxels"),
        (np.append(np.full(5000, 7.0), [8.0, 9.0]), "one intensity"),
    ],
)
@pytest.mark.parametrize("maker", [SoftSegmentation(), PartialVolume(), Mixture(), Ramps()])
def test_a_scan_without_three_tissues_is_refused(values, reason, maker):
    with pytest.raises(TissuesNotFound, match=reason):
        maker(brain(values))


def test_tissues_that_are_hardly_distinct_are_noted_and_two_instead_of_three_refused():
    generator = np.random.default_rng(0)
    notes = PartialVolume()(brain(generator.normal(70, 10, 60_000).clip(1))).notes
    assert any("hardly distinct" in note for note in notes)
    two = np.append(generator.normal(30, 5, 30_000), generator.normal(80, 5, 30_000))
    with pytest.raises(TissuesNotFound, match="two are 0"):
        PartialVolume()(brain(two))


def test_soft_boundaries_lie_at_the_given_share_between_the_means():
    values = np.concatenate([draw_partial_volumes()[0].clip(1), [30, 62, 70, 94, 100, 130, 1]])
    maps = SoftSegmentation(boundary=0.8, width=0.2)(brain(values)).values.reshape(3, -1)[:, 5000 + len(values) - 7 :]
    expected = [[1, 0.5, 0, 0, 0, 0, 1], [0, 0.5, 1, 0.5, 0, 0, 0], [0, 0, 0, 0.5, 1, 1, 0]]
    np.testing.assert_allclose(maps[:, :7], expected, atol=0.25)
    wide = SoftSegmentation(boundary=0.5, width=1.0)(brain(values)).values
    np.testing.assert_allclose(wide.sum(0)[wide.sum(0) > 0], 1, atol=1e-6)
    with pytest.raises(UserError, match=r"boundary 1\.2"):
        SoftSegmentation(boundary=1.2)


@pytest.mark.parametrize("contrast", [0.0, 8.0, -8.0])
def test_the_segmentation_of_large_voxels_does_not_depend_on_the_contrast(contrast):
    values, fractions = draw_partial_volumes()
    other = values + contrast * fractions[1]  # grey matter becomes brighter or darker
    plain, changed = (SoftSegmentation()(brain(part.clip(1))).values for part in (values, other))
    assert np.abs(plain.reshape(3, -1).mean(1) - changed.reshape(3, -1).mean(1)).max() < 0.02
