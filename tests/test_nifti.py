"""Proves how unusual files are read: damaged gzip files, orientation, background, negative and missing intensities."""

import gzip
import os

import nibabel as nib
import numpy as np
import pytest

from ldae.data.file_version import FileVersion
from ldae.data.intensities import zero_background
from ldae.data.nifti import BadScan, load_label_map, load_scan, nifti_like
from ldae.data.transforms import Transform
from small_scans import brain

AFFINE = np.array(brain().affine)
VOXELS = np.asarray(brain().dataobj, dtype=np.float32)  # between 300 and 900 in the head, 0 around it
HEAD = VOXELS > 0


def image(data: np.ndarray, affine: np.ndarray = AFFINE) -> nib.Nifti1Image:
    return nib.Nifti1Image(data, affine)


def standardised() -> np.ndarray:
    """The head as z-scores, about half of them negative."""
    return ((VOXELS - VOXELS[HEAD].mean()) / VOXELS[HEAD].std()).astype(np.float32)


@pytest.fixture
def compressed(tmp_path):
    """A scan whose voxels are stored and not compressed, so that each byte of the file is a byte of the content."""
    nib.save(image(VOXELS), tmp_path / "scan.nii")
    content = gzip.compress((tmp_path / "scan.nii").read_bytes(), 0)
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(content)
    return path, content


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_one_changed_bit_in_a_gzip_file_is_found(compressed, place):
    path, content = compressed
    damaged = bytearray(content)
    damaged[int(place * len(content))] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(BadScan, match="checksum is wrong"):
        load_scan(path)


@pytest.mark.parametrize("missing", [1, 4, 8, 1000])
def test_a_gzip_file_without_its_end_is_truncated(compressed, missing):
    path, content = compressed
    path.write_bytes(content[:-missing])
    with pytest.raises(BadScan, match="truncated"):
        load_scan(path)


def test_bytes_after_a_gzip_file_are_ignored_and_noted(compressed):
    path, content = compressed
    for rest, notes in ((b"", 0), (b"\0" * 512, 0), (b"<html>not found</html>", 1)):
        path.write_bytes(content + rest)
        scan = load_scan(path)
        np.testing.assert_array_equal(scan.data, VOXELS)
        assert len(scan.notes) == notes


def test_a_gzip_file_of_several_members_is_read_to_the_last(compressed):
    path, content = compressed
    plain = gzip.decompress(content)
    members = [gzip.compress(plain[start : start + 5000]) for start in range(0, len(plain), 5000)]
    path.write_bytes(b"".join(members))
    np.testing.assert_array_equal(load_scan(path).data, VOXELS)
    path.write_bytes(b"".join(members)[:-4])
    with pytest.raises(BadScan, match="truncated"):
        load_scan(path)


def test_a_file_that_was_not_fetched_or_has_another_name_is_named_as_such(tmp_path, compressed):
    (tmp_path / "link.nii.gz").symlink_to(".git/annex/objects/Xq/scan")
    (tmp_path / "unlocked.nii.gz").write_text("/annex/objects/MD5E-s99--0.nii.gz\n")
    (tmp_path / "lfs.nii.gz").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    os.rename(compressed[0], tmp_path / "other.nii")
    for name, reason in (
        ("link.nii.gz", r"a link to a file that is missing .*git annex get"),
        ("unlocked.nii.gz", "git annex get"),
        ("lfs.nii.gz", "git lfs pull"),
        ("other.nii", r"rename it to other.nii.gz"),
    ):
        with pytest.raises(BadScan, match=reason):
            load_scan(tmp_path / name)


@pytest.mark.parametrize("norm", [1 + 2e-7, 1 + 1e-4])
def test_a_quaternion_that_is_rounded_is_read(tmp_path, norm):
    scan = image(VOXELS)
    scan.set_qform(AFFINE, 1)
    scan.set_sform(None, 0)
    nib.save(scan, tmp_path / "scan.nii")
    content = bytearray((tmp_path / "scan.nii").read_bytes())
    half = norm / np.sqrt(2)
    content[256:268] = np.array([half, half, 0], "<f4").tobytes()
    (tmp_path / "scan.nii").write_bytes(content)
    turned = np.array([[0, 1, 0], [1, 0, 0], [0, 0, -1]])  # by 180 degrees about the diagonal of x and y
    np.testing.assert_allclose(load_scan(tmp_path / "scan.nii").affine[:3, :3], 4 * turned, atol=1e-3)


def test_the_sform_is_used_and_a_qform_that_contradicts_it_is_noted(tmp_path):
    turned = AFFINE @ np.diag([-1.0, -1.0, 1.0, 1.0])
    slightly = AFFINE.copy()
    slightly[:3, 3] += 30
    for qform, note in ((AFFINE * [[-1], [1], [1], [1]], "mirrored"), (turned, "180 degrees"), (slightly, None)):
        scan = image(VOXELS)
        scan.set_sform(AFFINE, 1)
        scan.set_qform(qform, 1)
        nib.save(scan, tmp_path / "scan.nii.gz")
        found = load_scan(tmp_path / "scan.nii.gz")
        np.testing.assert_allclose(found.affine, AFFINE)
        assert [note in text for text in found.notes] == ([True] if note else [])


def test_files_without_orientation_are_rejected_unless_it_is_given(tmp_path):
    scan = image(VOXELS)
    scan.set_sform(None, 0)
    scan.set_qform(None, 0)
    nib.save(scan, tmp_path / "codes.nii")
    nib.save(nib.AnalyzeImage(VOXELS, AFFINE), tmp_path / "analyze.img")
    nib.save(nib.MGHImage(VOXELS, AFFINE), tmp_path / "flag.mgh")
    content = bytearray((tmp_path / "flag.mgh").read_bytes())
    content[28:30] = b"\0\0"
    (tmp_path / "flag.mgh").write_bytes(content)
    for name in ("codes.nii", "analyze.img", "analyze.hdr", "flag.mgh"):
        with pytest.raises(BadScan, match="left and right are unknown"):
            load_scan(tmp_path / name)
        for orientation in ("RAS", "LAS"):
            found = load_scan(tmp_path / name, orientation)
            assert "".join(nib.aff2axcodes(found.affine)) == orientation
            assert orientation in found.notes[0]
            np.testing.assert_array_equal(found.data, VOXELS)


def test_an_orientation_that_is_given_does_not_replace_a_stated_one(tmp_path):
    nib.save(image(VOXELS), tmp_path / "scan.nii")
    nib.save(nib.Spm99AnalyzeImage(VOXELS, AFFINE), tmp_path / "spm.img")  # with its .mat file
    for name in ("scan.nii", "spm.img"):
        found = load_scan(tmp_path / name, "LAS")
        np.testing.assert_allclose(found.affine, AFFINE, atol=1e-5)
        assert not found.notes


def test_a_header_and_its_voxels_are_one_version(tmp_path):
    nib.save(nib.AnalyzeImage(VOXELS, AFFINE), tmp_path / "scan.img")
    before = FileVersion.of(tmp_path / "scan.hdr").cache_key()
    os.utime(tmp_path / "scan.img", (1, 2e9))
    assert FileVersion.of(tmp_path / "scan.hdr").cache_key() != before


@pytest.mark.parametrize("negative", [0.0, -3.0])
def test_a_usual_scan_is_read_to_the_bit(negative):
    """Background of 0 or noise around it, also with the small negative intensities of an interpolation."""
    noisy = np.where(HEAD, VOXELS, np.random.default_rng(0).uniform(negative, 4, VOXELS.shape)).astype(np.float32)
    for data in (VOXELS, noisy, np.where(HEAD & (noisy < 350), negative, VOXELS).astype(np.float32)):
        found = load_scan(image(data))
        np.testing.assert_array_equal(found.data, data)
        assert found.offset == 0
        assert not found.changed


def test_a_constant_background_becomes_0_and_the_head_stays_above_it():
    for data, offset in (
        (np.where(HEAD, VOXELS / 900 - 0.5, -0.5), -0.5),  # MP2RAGE UNI
        (np.where(HEAD, VOXELS, -1024), -1024),
        (np.where(HEAD, VOXELS, 7), 7),
    ):
        found = load_scan(image(data.astype(np.float32)))
        assert found.offset == offset
        assert (found.data[~HEAD] == 0).all()
        np.testing.assert_allclose(found.data[HEAD] + offset, data[HEAD], rtol=1e-4)
        assert found.data[HEAD].min() > 0
        assert "background" in found.notes[0]


@pytest.mark.parametrize("background", [0.0, np.nan, "noise"])
def test_signed_intensities_keep_their_order_above_the_background(background):
    scores = standardised()
    if background == "noise":
        around = np.random.default_rng(0).normal(scores[HEAD].min() - 1, 0.1, scores.shape)
    else:
        around = np.full(scores.shape, background)
    found = load_scan(image(np.where(HEAD, scores, around).astype(np.float32)))
    assert found.data[HEAD].min() > 0
    np.testing.assert_allclose(found.data[HEAD] + found.offset, scores[HEAD], atol=1e-5)
    assert found.data[~HEAD].max() < found.data[HEAD].min() if background == "noise" else not found.data[~HEAD].any()


def test_the_scale_of_the_intensities_does_not_matter_in_model_space():
    transform = Transform((16, 16, 16), 6.0)
    usual = transform(image(VOXELS))
    for data in (np.where(HEAD, VOXELS / 900 - 0.5, -0.5), np.where(HEAD, VOXELS, np.nan), VOXELS * 0.01):
        np.testing.assert_allclose(transform(image(data.astype(np.float32))), usual, atol=2e-5)
    placed = transform.to_model_space(image((VOXELS / 900 - 0.5).astype(np.float32)))
    restored = transform.inverse(placed.volume, image((VOXELS / 900 - 0.5).astype(np.float32))).get_fdata()
    assert np.median(restored[HEAD]) == pytest.approx(np.median(VOXELS[HEAD] / 900 - 0.5), abs=0.05)
    assert restored[0, 0, 0] == pytest.approx(placed.low, abs=1e-6)


def test_missing_voxels_around_the_head_become_0_and_inside_are_rejected():
    around = np.where(HEAD, VOXELS, np.nan).astype(np.float32)
    found = load_scan(image(around))
    np.testing.assert_array_equal(found.data, VOXELS)
    assert "NaN" in found.notes[0]
    hole, slab, infinite = around.copy(), around.copy(), around.copy()
    hole[10, 12, 11] = np.nan
    slab[:, :, 11] = np.nan
    infinite[0, 0, 0] = np.inf
    for data in (hole, slab, infinite):
        with pytest.raises(BadScan, match="NaN or infinite"):
            load_scan(image(data))
    with pytest.raises(BadScan, match="NaN or infinite"):
        load_label_map(image(around))


def test_voxels_that_overflowed_16_bits_are_unwrapped():
    bright = np.rint(VOXELS * 45000 / VOXELS.max())
    stored = bright.astype(np.int64).astype(np.uint16).astype(np.int16)
    assert (stored < 0).sum() > 50
    found = load_scan(image(stored))
    np.testing.assert_array_equal(found.data, bright)
    assert "overflowed" in found.notes[0]


def test_a_negative_filling_value_is_no_overflow():
    filled = np.where(HEAD, VOXELS * 30, -32768).astype(np.int16)
    found = load_scan(image(filled))
    np.testing.assert_allclose(found.data[HEAD] - 32768, filled[HEAD], atol=0.01)
    assert not found.data[~HEAD].any()


def test_negative_intensities_by_the_intercept_of_a_file_are_no_overflow(tmp_path):
    """Stored numbers from 0 to 30000, of which the header says that 1000 is to be subtracted."""
    scan = image(np.where(HEAD, VOXELS * 30, 0).astype(np.int16))
    scan.header.set_slope_inter(1, -1000)
    content = bytearray(scan.to_bytes())
    content[112:120] = np.array([1, -1000], "<f4").tobytes()
    (tmp_path / "scan.nii").write_bytes(content)
    found = load_scan(tmp_path / "scan.nii")
    assert found.offset == -1000
    np.testing.assert_array_equal(found.data, np.asarray(scan.dataobj, dtype=np.float32))


def test_a_volume_without_any_value_is_rejected():
    with pytest.raises(BadScan, match="NaN"):
        load_scan(image(np.full(VOXELS.shape, np.nan, np.float32)))


def test_negative_voxels_are_noted():
    data = np.random.default_rng(0).normal(0, 3, VOXELS.shape).astype(np.float32) + VOXELS
    assert "negative" in load_scan(image(data)).notes[0]
    assert not zero_background(np.abs(data)).notes


def test_a_label_map_is_read_as_it_is():
    labels = np.where(HEAD, 3, 1).astype(np.int16)
    np.testing.assert_array_equal(load_label_map(image(labels)).data, labels)
    assert load_label_map(image(np.full((5, 5, 5), 2, np.int16))).data.max() == 2


def test_a_result_has_the_place_of_a_scan_and_none_of_its_text():
    scan = image(VOXELS)
    scan.set_qform(AFFINE, 1)
    scan.set_sform(AFFINE, 4)
    scan.header.set_xyzt_units("mm", "sec")
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        scan.header[field] = b"DOE^JANE"
    scan.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    result = nifti_like(2 * VOXELS, scan)
    assert b"DOE" not in result.to_bytes()
    assert not result.header.extensions
    assert result.header.get_xyzt_units() == ("mm", "sec")
    assert (result.header["qform_code"], result.header["sform_code"]) == (1, 4)
    np.testing.assert_array_equal(result.affine, scan.affine)
    np.testing.assert_array_equal(result.get_fdata(), 2 * VOXELS)
