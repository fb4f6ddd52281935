"""Tests that results come back on a scan's own grid and intensities, whatever its orientation, and which scans are
rejected or preprocessed.
"""

import nibabel as nib
import numpy as np
import pytest
import torch

from ldae import LDAE
from ldae.data.nifti import BadScan
from ldae.data.transforms import Transform
from ldae.scans.ood_check import OodCheck
from ldae.scans.raw_scan import PreprocessedImage, TrainingPreprocessing
from ldae.scans.scan import nifti_in_model_space, open_scan, reorient_to_ras, scan_name
from ldae.utils.errors import UserError
from small_scans import SHAPE, brain, reoriented


@pytest.mark.parametrize("axcodes", ["LPI", "PSR", "ASL"])
def test_results_do_not_depend_on_a_scans_orientation(model, axcodes):
    """y is bit-equal; images are on the scans' own grids, and equal after reorientation to RAS."""
    scan, twin = model.open(brain()), model.open(reoriented(brain(), axcodes))
    assert torch.equal(model.embed(scan), model.embed(twin))
    start, edited = model.manipulate_each(scan, "diagnosis", [0.0, 2.0])
    for mine, other in (
        (scan.restored(edited), twin.restored(edited)),
        (scan.edited(edited, start), twin.edited(edited, start)),
    ):
        assert "".join(nib.aff2axcodes(other.affine)) == axcodes
        back = reoriented(other, "RAS")
        np.testing.assert_allclose(back.affine, mine.affine)
        np.testing.assert_allclose(back.get_fdata(), mine.get_fdata(), atol=1e-3)


def test_an_edit_without_change_returns_the_scan(model):
    scan = model.open(brain(empty=3), check=False)
    volume = model.reconstruct(scan)
    same = scan.edited(volume, volume)
    np.testing.assert_array_equal(same.get_fdata(), scan.image.get_fdata())
    np.testing.assert_array_equal(same.affine, scan.image.affine)


def test_a_change_is_at_the_same_place_in_the_scans_own_units():
    """A brighter block in model space is a brighter block at the same mm of the scan, and nothing else changes."""
    transform = Transform((8, 8, 8), 9.0)
    scan = open_scan(reoriented(brain(), "PSR"), transform)
    before, after = scan.volume, scan.volume.clone()
    after[0, 0, 5:7, 2:4, 4:6] += 0.5
    image = scan.edited(after, before)
    change = image.get_fdata() - scan.image.get_fdata()
    assert change.max() == pytest.approx(0.5 * (scan.prepared.high - scan.prepared.low), rel=1e-3)
    assert change.min() > -1e-3
    centre = (np.indices(change.shape).reshape(3, -1) * change.ravel()).sum(1) / change.sum()
    expected = scan.prepared.affine @ [5.5, 2.5, 4.5, 1]
    np.testing.assert_allclose(nib.affines.apply_affine(image.affine, centre), expected[:3], atol=1.0)
    assert np.count_nonzero(np.abs(change) > 1) < 8 * (9 / 4) ** 3 * 4


def test_an_edit_neither_changes_the_background_nor_makes_a_brain_voxel_part_of_it():
    """A brain without skull stays without skull, and a ventricle that grows does not become background."""
    image = brain(empty=3)
    original = image.get_fdata()
    scan = open_scan(image, Transform((8, 8, 8), 9.0))
    for change in (-1.0, 1.0):
        edited = scan.edited(scan.volume + change, scan.volume).get_fdata()
        np.testing.assert_array_equal(edited > 0, original > 0)
        assert edited[original > 0].min() >= original[original > 0].min()
    assert edited.max() > original.max()


def test_paths_images_and_lists_are_transformed_and_tensors_are_not(model, tmp_path):
    nib.save(brain(), tmp_path / "sub-01_T1w.nii.gz")
    scan = model.open(tmp_path / "sub-01_T1w.nii.gz")
    assert scan.name == "sub-01_T1w"
    y = model.embed(scan.volume)
    for x in (tmp_path / "sub-01_T1w.nii.gz", str(tmp_path / "sub-01_T1w.nii.gz"), brain(), scan):
        assert torch.equal(model.embed(x), y)
    both = model.embed([brain(), brain(1)])
    torch.testing.assert_close(both, torch.cat([y, model.embed(brain(1))]))
    assert model.interpolate(brain(), scan, 0.5).shape == scan.volume.shape


def test_a_scan_with_four_axes_and_one_volume_keeps_its_shape(model):
    image = brain()
    four = nib.Nifti1Image(np.asarray(image.dataobj)[..., None], image.affine)
    scan = model.open(four)
    assert scan.restored(scan.volume).shape == (*SHAPE, 1)
    assert scan.edited(scan.volume, scan.volume).shape == (*SHAPE, 1)


def test_scans_that_fail_the_out_of_distribution_check_are_rejected_with_the_reason(model, tmp_path):
    """Further brains pass; a head that fills the field of view and a brain at another place do not."""
    for seed in range(20, 30):
        model.open(brain(seed))
    nib.save(brain(size=3.0), tmp_path / "head.nii.gz")
    with pytest.raises(
        BadScan, match=r"head.nii.gz: rejected by the out-of-distribution check: .* of its field of view is foreground"
    ):
        model.open(tmp_path / "head.nii.gz")
    data = np.roll(np.asarray(brain().dataobj), 6, axis=1)
    with pytest.raises(BadScan, match="correlates"):
        model.embed(nib.Nifti1Image(data, brain().affine))
    assert model.open(brain(size=3.0), check=False).volume.shape == (1, 1, 8, 8, 8)


def doubled():
    """A "head" twice as wide as its brain, and a preprocessing that crops it to the brain and doubles intensities."""
    head = np.zeros((40, 24, 22), np.int16)
    head[20:] = np.asarray(brain().dataobj) // 2

    def crop(source):
        return PreprocessedImage(brain(), lambda array: np.concatenate([np.zeros_like(array), array]), 0.5, "by hand")

    return nib.Nifti1Image(head, brain().affine), crop


def test_a_preprocessed_scan_comes_back_on_its_own_grid_and_intensities(model, caplog):
    image, crop = doubled()
    head = image.get_fdata()
    scan = open_scan(image, model.transform, model.ood_check, crop)
    assert "rejected by the out-of-distribution check" in caplog.text
    plain = model.open(brain())
    torch.testing.assert_close(scan.volume, plain.volume)
    change = scan.edited(scan.volume + 0.1, scan.volume).get_fdata() - head
    expected = plain.edited(scan.volume + 0.1, scan.volume).get_fdata() - brain().get_fdata()
    assert change.shape == head.shape
    assert np.abs(change[:20]).max() == 0
    np.testing.assert_allclose(change[20:], 0.5 * expected, atol=1e-3)
    np.testing.assert_array_equal(scan.edited(scan.volume, scan.volume).get_fdata(), head)
    restored = scan.restored(scan.volume).get_fdata()[20:]
    np.testing.assert_allclose(restored, 0.5 * plain.restored(scan.volume).get_fdata(), atol=1e-3)
    with pytest.raises(BadScan, match=r"rejected by .*, even after preprocessing"):
        open_scan(image, model.transform, model.ood_check, lambda source: PreprocessedImage(image, lambda array: array))


def test_preprocessing_is_automatic_always_or_never(model, monkeypatch):
    """It is automatic only if the training scans are known to have been preprocessed."""
    image, crop = doubled()
    monkeypatch.setattr(TrainingPreprocessing, "__call__", lambda self, source: crop(source))
    monkeypatch.setattr(model, "preprocess", TrainingPreprocessing(model.transform))
    with pytest.raises(BadScan, match="out-of-distribution"):
        model.open(image)
    y = model.embed(model.open(image, preprocess="always"))
    assert torch.equal(model.embed(model.open(image, preprocess=True)), y)
    monkeypatch.setattr(model, "preprocess", TrainingPreprocessing(model.transform, affine=np.eye(4)))
    assert torch.equal(model.embed(image), y)
    with pytest.raises(BadScan, match="out-of-distribution"):
        model.open(image, preprocess="never")
    monkeypatch.setattr(model, "preprocess", None)
    with pytest.raises(BadScan, match="out-of-distribution"):
        model.embed(image)
    with pytest.raises(UserError, match="without preprocessing"):
        model.open(image, preprocess="always")
    with pytest.raises(UserError, match="auto, always or never"):
        model.open(image, preprocess="sometimes")


def test_an_out_of_distribution_check_reads_back_as_it_was_written(model):
    stored = model.ood_check.to_dict()
    again = OodCheck.from_dict(stored)
    np.testing.assert_array_equal(again.mean, model.ood_check.mean)
    assert again.foreground == model.ood_check.foreground
    with pytest.raises(UserError, match="damaged"):
        OodCheck.from_dict(stored | {"shape": [1, 2, 3]})
    assert OodCheck.fit([]) is None


def test_a_sampled_volume_has_the_axes_voxel_size_and_centre_of_model_space():
    image = nifti_in_model_space(torch.rand(1, 8, 10, 12), Transform((8, 10, 12), 1.5, orientation="LAS"))
    assert "".join(nib.aff2axcodes(image.affine)) == "LAS"
    np.testing.assert_allclose(nib.affines.voxel_sizes(image.affine), 1.5)
    np.testing.assert_allclose(nib.affines.apply_affine(image.affine, [3.5, 4.5, 5.5]), 0, atol=1e-9)
    np.testing.assert_array_equal(reorient_to_ras(image.get_fdata(), "LAS"), image.get_fdata()[::-1])


def test_a_scans_name_has_neither_folder_nor_ending():
    assert scan_name("a.b/sub-01_ses-M00.5_T1w.nii.gz") == "sub-01_ses-M00.5_T1w"
    assert scan_name("x.mgz") == "x"
    assert scan_name(brain()) == "scan"


def test_reduced_precision_changes_y_slightly_and_returns_float32(model):
    coarse = LDAE.load(model.bundle.networks["unet"].file.parents[2], device="cpu", dtype=torch.bfloat16)
    y, exact = coarse.embed(brain()), model.embed(brain())
    assert y.dtype == torch.float32
    assert 0 < (y - exact).norm() < 0.05 * exact.norm()
    assert coarse.generate(coarse.noise(1), y).dtype == torch.float32
    with pytest.raises(UserError, match="dtype"):
        LDAE.load(model.bundle.networks["unet"].file.parents[2], dtype=torch.int8)
