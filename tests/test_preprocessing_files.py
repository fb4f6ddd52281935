"""Proves that preprocessing takes unusual files (backgrounds, orientations, rounded limits) and says what it did."""

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

import small_datasets
from ldae.cli import main
from ldae.data.nifti import READING, BadScan
from ldae.data.transforms import Transform
from ldae.preprocessing.brain import Stripped
from ldae.preprocessing.measures import Limits, find_cut_sides
from ldae.preprocessing.steps import PreprocessingSteps
from ldae.preprocessing.volume import Volume
from ldae.scans.raw_scan import TrainingPreprocessing
from ldae.scans.scan import open_scan
from ldae.utils.files import read_json, write_json
from small_datasets import run

pytestmark = pytest.mark.usefixtures("no_worker_processes")

STEPS = PreprocessingSteps(bias=None, brain=Stripped(), registration=None, spacing=5.0)
QUICK = ("--bias", "none", "--brain", "stripped", "--registration", "none", "--spacing", "5", "-j", "1")


def image(data, affine):
    return nib.Nifti1Image(np.asarray(data, dtype=np.float32), affine)


def brain(**options):
    volume = small_datasets.brain(**options)
    return image(volume.data, volume.affine)


def bids(root, images):
    """Write a BIDS dataset; `images` by subject."""
    for name, scan in images.items():
        folder = root / name / "anat"
        folder.mkdir(parents=True)
        nib.save(scan, folder / f"{name}_T1w.nii.gz")
    return root


def test_scales_and_backgrounds_give_the_same_brain(tmp_path):
    scan = brain()
    data = scan.get_fdata()
    usual = STEPS(scan, tmp_path)
    for values, offset in (
        (np.where(data > 0, data / 120 - 0.5, -0.5), 0.5),  # MP2RAGE UNI
        (np.where(data > 0, data / 120, np.nan), 0.0),  # SPM
    ):
        found = STEPS(image(values, scan.affine), tmp_path)
        np.testing.assert_array_equal(found.mask, usual.mask)
        np.testing.assert_allclose(120 * found.scan.data, usual.scan.data, atol=1e-3)
        assert found.offset == -offset
        assert len(found.notes) == 1
    scores = (data - data[data > 0].mean()) / data[data > 0].std()
    standardised = STEPS(image(np.where(data > 0, scores, 0), scan.affine), tmp_path)
    np.testing.assert_array_equal(standardised.mask, usual.mask)
    assert np.corrcoef(standardised.scan.data[usual.mask], usual.scan.data[usual.mask])[0, 1] > 0.99


def test_remarks_are_in_the_sidecar_on_the_page_and_in_the_log(tmp_path, caplog):
    scan = brain()
    mirrored = scan.affine * [[-1], [1], [1], [1]]
    scan.set_sform(scan.affine, 1)
    scan.set_qform(mirrored, 1)
    root = bids(tmp_path / "raw", {"sub-1": scan, "sub-2": brain()})
    result = CliRunner().invoke(main, ["preprocess", str(root), str(tmp_path / "out"), *QUICK])
    assert result.exit_code == 0, result.output
    notes = [
        read_json(tmp_path / "out" / name / "anat" / f"{name}_res-5mm_desc-preproc_T1w.json")["Notes"]
        for name in ("sub-1", "sub-2")
    ]
    assert ["mirrored" in note for note in notes[0]] == [True]
    assert notes[1] == []
    assert notes[0][0] in (tmp_path / "out" / "qc.html").read_text()
    assert [notes[0][0] in message for message in caplog.messages if "sub-" in message] == [True]


def test_limits_have_a_tolerance_for_rounding():
    limits = Limits(voxel_mm=(1.0, 5.0), field_mm=(100.0, 500.0), brain_cm3=(800.0, 2200.0))
    for size in (5.0 * (1 + 1e-7), 5.0005):
        limits.check_grid(Volume(np.zeros((40, 40, 100), np.float32), np.diag([size, size, 1 - 1e-7, 1])))
    limits.check_brain(800e3 * (1 - 1e-6))
    limits.check_correlation(limits.correlation - 1e-6)
    for size in (5.1, 0.9):
        with pytest.raises(BadScan, match=r"voxel size .* --set preprocess.limits.voxel_mm"):
            limits.check_grid(Volume(np.zeros((100, 100, 100), np.float32), np.diag([size, 2, 2, 1])))
    with pytest.raises(BadScan, match="field of view"):
        limits.check_grid(Volume(np.zeros((40, 100, 100), np.float32), np.diag([2, 2, 2, 1])))


def thick_brain():
    """A brain in slices of 8 mm."""
    scan = brain(spacing=2.0, shape=(88, 104, 80))
    affine = scan.affine @ np.diag([1, 1, 4, 1])
    return image(scan.get_fdata()[:, :, ::4], affine)


def test_thick_slices_are_taken_where_the_limit_says_so(tmp_path):
    root = bids(tmp_path / "raw", {"sub-1": thick_brain()})
    command = ["preprocess", str(root), str(tmp_path / "out"), *QUICK]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code != 0
    assert "voxel size of 2 x 2 x 8 mm" in refused.stderr
    assert "--set preprocess.limits.voxel_mm" in refused.stderr
    assert CliRunner().invoke(main, [*command, "--set", "preprocess.limits.voxel_mm=[0.3,9]"]).exit_code == 0


def test_without_the_check_a_scan_outside_the_limits_is_preprocessed(monkeypatch):
    monkeypatch.setattr("ldae.scans.raw_scan.check_installed", lambda steps: None)
    transform = Transform((16, 16, 16), 9.0)
    preprocess = TrainingPreprocessing(transform, STEPS.parameters())
    with pytest.raises(BadScan, match=r"voxel size .* --preprocess --force"):
        open_scan(thick_brain(), transform, None, preprocess, always=True)
    unlimited = TrainingPreprocessing(transform, STEPS.parameters(), limited=False)
    scan = open_scan(thick_brain(), transform, None, unlimited, always=True)
    assert 0.9 < scan.volume.max() <= 1


def test_a_preprocessed_scan_with_another_background_comes_back_to_its_own_intensities(monkeypatch):
    monkeypatch.setattr("ldae.scans.raw_scan.check_installed", lambda steps: None)
    raw = brain()
    data = raw.get_fdata()
    shifted = image(np.where(data > 0, data / 120 - 0.5, -0.5), raw.affine)
    transform = Transform((30, 36, 30), 5.0)
    scan = open_scan(shifted, transform, None, TrainingPreprocessing(transform, STEPS.parameters()), always=True)
    restored, inside = scan.restored(scan.volume).get_fdata(), data > 60
    assert np.median(restored[inside]) == pytest.approx(np.median(shifted.get_fdata()[inside]), abs=0.1)
    assert restored[0, 0, 0] == pytest.approx(scan.prepared.low - 0.5, abs=1e-3)
    np.testing.assert_allclose(
        scan.edited(scan.volume, scan.volume).get_fdata(), shifted.get_fdata(), atol=1e-6
    )  # without a change


def test_an_analyze_scan_is_taken_with_the_orientation_that_is_given(tmp_path):
    scan = brain()
    nib.save(nib.AnalyzeImage(scan.get_fdata().astype(np.int16), scan.affine), tmp_path / "old.img")
    nib.save(brain(), tmp_path / "new.nii.gz")
    (tmp_path / "list.csv").write_text("path,subject\nold.img,1\nnew.nii.gz,2\n")
    command = ["preprocess", str(tmp_path / "list.csv"), str(tmp_path / "out"), *QUICK]
    CliRunner().invoke(main, command)
    assert "give --orientation RAS or LAS" in (tmp_path / "out" / "rejected.csv").read_text()
    records = tmp_path / "out" / "records"
    stamp = (records / "sub-2.json").stat().st_mtime_ns
    assert CliRunner().invoke(main, [*command, "--orientation", "LAS"]).exit_code == 0
    assert "LAS was assumed" in read_json(records / "sub-1.json")["notes"][0]
    assert (records / "sub-2.json").stat().st_mtime_ns == stamp  # its file states its own
    other = CliRunner().invoke(main, [*command, "--orientation", "RAS"])
    assert other.exit_code == 0
    assert "RAS was assumed" in read_json(records / "sub-1.json")["notes"][0]


def test_a_scan_of_an_earlier_version_is_kept_if_it_is_still_read_as_then(tmp_path):
    data = brain().get_fdata()
    shifted = image(np.where(data > 0, data, 9), brain().affine)
    root = bids(tmp_path / "raw", {"sub-1": brain(), "sub-2": shifted})
    run(root, tmp_path / "out")
    scans = [next((tmp_path / "out" / name / "anat").glob("*T1w.nii.gz")) for name in ("sub-1", "sub-2")]
    before = [scan.stat().st_mtime_ns for scan in scans]
    for name in ("sub-1", "sub-2"):
        path = tmp_path / "out" / "records" / f"{name}.json"
        write_json(path, {key: value for key, value in read_json(path).items() if key != "reading"})
    run(root, tmp_path / "out")
    after = [scan.stat().st_mtime_ns for scan in scans]
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert {read_json(path)["reading"] for path in (tmp_path / "out" / "records").glob("*.json")} == {READING}


def test_the_side_on_which_a_brain_is_cut_off_is_named():
    scan = brain()
    whole = Volume(scan.get_fdata().astype(np.float32), scan.affine)
    assert find_cut_sides(whole.data > 0, whole) == []
    affine = scan.affine.copy()
    affine[:3, 3] += affine[:3, 2] * 14
    for codes in ("RAS", "PIR"):
        cut = image(whole.data[:, :, 14:], affine)
        turn = nib.orientations.ornt_transform(
            nib.io_orientation(cut.affine), nib.orientations.axcodes2ornt(tuple(codes))
        )
        cut = cut.as_reoriented(turn)
        volume = Volume(cut.get_fdata().astype(np.float32), cut.affine)
        assert find_cut_sides(volume.data > 0, volume) == ["inferior"]
