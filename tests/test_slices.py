"""Tests which slices are shown: which way up they are, where volumes are cut, and how positions are spaced."""

import numpy as np

from ldae.utils.slices import evenly_spaced_positions, slices_to_show, voxel_to_show


def test_slices_are_the_right_way_up():
    """A mark at the front, top and right of the head: top right in axial and coronal slices, in front in sagittal."""
    volume = np.zeros((8, 10, 6), np.float32)
    volume[6, 8, 4] = 1
    shown = slices_to_show(volume, (6, 8, 4))
    assert list(shown) == ["axial", "coronal", "sagittal"]
    assert shown["axial"].shape == (10, 8)
    assert shown["axial"][1, 6] == 1
    assert shown["coronal"][1, 6] == 1
    assert shown["sagittal"][1, 8] == 1


def test_volumes_are_cut_in_the_middle_or_through_a_region():
    volume = np.arange(4 * 5 * 6.0).reshape(4, 5, 6)
    np.testing.assert_array_equal(slices_to_show(volume)["axial"], np.flipud(volume[:, :, 3].T))
    assert voxel_to_show(None, (40, 50, 60)) == (20, 25, 30)
    region = np.zeros((40, 50, 60), bool)
    region[18:23, 10:13, 30] = True
    assert voxel_to_show(region, region.shape) == (22, 11, 30)


def test_positions_are_evenly_spaced_inside_the_region():
    region = np.zeros((30, 10, 10), bool)
    region[5:26, 4, 4] = True
    assert evenly_spaced_positions(region, "sagittal", 3) == [10, 15, 20]
