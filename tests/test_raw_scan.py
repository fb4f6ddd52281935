"""Tests the preprocessing of a raw scan: it takes the training scans' steps and grid, and changes come back to the raw
scan's own voxels and intensities.

ANTs is replaced by a shift of whole voxels that leaves a file, as ANTs' transforms do. One test uses ANTs and deepbet
on a whole head; it is skipped where these packages or the scan are missing.
"""

import gc
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion

from ldae.bundle.bundle import Bundle
from ldae.data.nifti import BadScan
from ldae.data.transforms import Transform
from ldae.preprocessing.bias import N4
from ldae.preprocessing.brain import Stripped
from ldae.preprocessing.intensity import Tissues
from ldae.preprocessing.measures import Limits
from ldae.preprocessing.registration import Registration
from ldae.preprocessing.steps import PreprocessingSteps
from ldae.preprocessing.template import Icbm152, TemplateFile, resample_onto
from ldae.preprocessing.volume import Volume
from ldae.scans.raw_scan import TrainingPreprocessing, read_recorded_parameters
from ldae.scans.scan import open_scan
from ldae.stages.encode_latents import common_affine
from ldae.utils.errors import UserError
from small_run import small_run
from small_scans import brain

pytestmark = pytest.mark.usefixtures("no_worker_processes")

SHARED = Path(os.environ.get("LDAE_SHARED", Path(__file__).parents[2] / "shared"))
HEAD = SHARED / "data" / "ds000011" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
SHIFT = 12.0  # mm from the scan to the "template"
ANY = Limits(field_mm=(10, 1e3), brain_cm3=(1, 1e4), correlation=-1.0)


def shifted(affine, shift):
    """An affine moved by `shift` mm along x."""
    return affine + np.outer([shift, 0, 0, 0], [0, 0, 0, 1])


@dataclass(frozen=True)
class Shift:
    """Stands for the transforms of ANTs: a shift along x."""

    file: Path

    def affine_determinant(self):
        return 1.0

    def to_template(self, scan, grid, interpolator):
        return resample_onto(Volume(scan.data, shifted(scan.affine, SHIFT)), grid)

    def to_native(self, volume, grid, interpolator):
        assert self.file.exists()
        return resample_onto(Volume(volume.data, shifted(volume.affine, -SHIFT)), grid)


def steps(template, bias=lambda scan: scan.with_data(2 * scan.data)):
    """Steps that double intensities and shift the scan."""

    def register(brain, fixed, folder):
        (folder / "shift").write_text("12 mm")
        return Shift(folder / "shift")

    register.spacing, register.transform = 4.0, "Shift"
    return PreprocessingSteps(bias, Stripped(), register, template, limits=ANY, spacing=4.0)


@dataclass(frozen=True)
class ShiftPreprocessing(TrainingPreprocessing):
    """Training preprocessing with the steps above."""

    template: Path | None = None

    @property
    def steps(self):
        return steps(TemplateFile(str(self.template)))


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A scan, the same scan in the template's place, and the preprocessing from one to the other for 9 mm voxels."""
    image = brain()
    placed = nib.Nifti1Image(np.asarray(image.dataobj), shifted(image.affine, SHIFT))
    nib.save(placed, tmp_path / "template.nii.gz")
    transform = Transform((16, 16, 16), 9.0)
    monkeypatch.setattr("ldae.scans.raw_scan.check_installed", lambda steps: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    affine = transform.to_model_space(placed).affine
    return image, placed, ShiftPreprocessing(transform, {}, affine, template=tmp_path / "template.nii.gz")


def test_a_preprocessed_scan_is_on_the_training_scans_grid(raw):
    image, placed, preprocess = raw
    scan = preprocess.transform.to_model_space(preprocess(image).image)
    np.testing.assert_allclose(scan.affine, preprocess.affine, atol=0.01)
    expected = preprocess.transform.to_model_space(placed).volume
    assert np.corrcoef(scan.volume.ravel(), expected.ravel())[0, 1] > 0.99


def test_a_training_grid_other_than_the_transforms_own_is_kept(raw):
    """The training scans' grid is 18 mm lower than where the transform alone would put the scan."""
    image, _, preprocess = raw
    moved = np.array(preprocess.affine)
    moved[2, 3] -= 18.0
    other = replace(preprocess, affine=moved)
    volumes = [each.transform.to_model_space(each(image).image) for each in (preprocess, other)]
    np.testing.assert_allclose(volumes[1].affine, moved, atol=0.01)
    middle = [np.argwhere(v.volume[0] > 0.1).mean(0) for v in volumes]
    np.testing.assert_allclose(middle[1] - middle[0], [0, 0, 2], atol=0.35)


def test_a_change_comes_back_to_the_raw_scans_voxels_and_intensities(raw, tmp_path):
    """The files of the spatial transforms are deleted together with the scan."""
    image, _, preprocess = raw
    scan = open_scan(image, preprocess.transform, None, preprocess, always=True)
    gc.collect()
    before, after = scan.volume, scan.volume.clone()
    after[0, 0, 7:9, 7:9, 7:9] += 0.5
    edited = scan.edited(after, before)
    assert edited.shape == image.shape
    np.testing.assert_array_equal(edited.affine, image.affine)
    change = edited.get_fdata() - image.get_fdata()
    high, low = scan.prepared.high, scan.prepared.low  # of the doubled intensities
    assert change.max() == pytest.approx(0.25 * (high - low), rel=0.05)
    centre = (np.indices(change.shape).reshape(3, -1) * change.ravel()).sum(1) / change.sum()
    expected = (scan.prepared.affine @ [7.5, 7.5, 7.5, 1])[:3] - [SHIFT, 0, 0]
    np.testing.assert_allclose(nib.affines.apply_affine(image.affine, centre), expected, atol=1.5)
    restored = scan.restored(scan.volume).get_fdata()
    inside = binary_erosion(image.get_fdata() > 0, iterations=3)
    assert np.corrcoef(restored[inside], image.get_fdata()[inside])[0, 1] > 0.9
    assert np.median(restored[inside] / image.get_fdata()[inside]) == pytest.approx(1, abs=0.1)
    assert len(list(tmp_path.glob("ldae-*"))) == 1
    del scan
    gc.collect()
    assert not list(tmp_path.glob("ldae-*"))


def test_parameters_read_back_as_they_were_written(tmp_path):
    chosen = PreprocessingSteps(N4(shrink=2), Stripped(), Registration("Rigid"), Icbm152(), Tissues(), Limits(), 2.0)
    assert PreprocessingSteps.from_parameters(json.loads(json.dumps(chosen.parameters()))) == chosen
    assert chosen.summary == "N4, Stripped, Rigid to MNI152NLin2009aSym, 2 mm, Tissues"
    for damage in ({"bias": {"step": "os.system"}}, {"nothing": 1}, {"bias": {"step": "N4", "command": 1}}):
        with pytest.raises(UserError, match="damaged"):
            PreprocessingSteps.from_parameters(chosen.parameters() | damage)


def write_scans(folder, parameters):
    """Write one scan for each of `parameters`, with these in its sidecar; returns the paths."""
    paths = []
    for number, value in enumerate(parameters):
        path = folder / f"sub-{number}_T1w.nii.gz"
        nib.save(brain(number), path)
        path.with_name(f"sub-{number}_T1w.json").write_text(json.dumps(value))
        paths.append(str(path))
    return paths


def test_parameters_are_recorded_if_all_training_scans_share_them(tmp_path):
    ours, other = ({"Parameters": PreprocessingSteps(spacing=size).parameters()} for size in (1.5, 2.0))
    paths = write_scans(tmp_path, [ours, ours, other, {"Parameters": "someone else's"}])
    assert read_recorded_parameters(paths[:2]) == ours["Parameters"]
    assert read_recorded_parameters(paths[:3]) is None
    assert read_recorded_parameters(paths[3:]) is None
    own = PreprocessingSteps(template=TemplateFile(str(tmp_path / "mine.nii.gz"))).parameters()
    recorded = read_recorded_parameters(write_scans(tmp_path, [{"Parameters": own}]))
    assert recorded["template"]["path"] == "mine.nii.gz"
    with pytest.raises(BadScan, match=r"template of their own, mine.nii.gz"):
        TrainingPreprocessing(Transform((8, 8, 8), 9.0), recorded)(brain())
    transform = Transform((8, 8, 8), 9.0)
    np.testing.assert_array_equal(common_affine(paths, transform), transform.to_model_space(brain()).affine)
    nib.save(nib.Nifti1Image(np.asarray(brain().dataobj)[1:], brain().affine), paths[1])
    assert common_affine(paths, transform) is None


def test_a_bundle_has_the_steps_and_the_grid_of_its_run(tmp_path):
    metadata = {"preprocess": PreprocessingSteps(spacing=2.0).parameters(), "affine": np.diag([9.0, 9, 9, 1]).tolist()}
    run = small_run(tmp_path / "run", metadata=metadata)
    Bundle.from_run(run).save(tmp_path / "bundle")
    for bundle in (Bundle.from_run(run), Bundle.open(tmp_path / "bundle")):
        assert bundle.preprocess == json.loads(json.dumps(metadata["preprocess"]))
        assert bundle.affine == metadata["affine"]
    assert "N4, DeepBet" in (tmp_path / "bundle" / "README.md").read_text()
    for key, value in (("affine", [[1, 2]]), ("affine", "no"), ("preprocess", 3)):
        path = tmp_path / "bundle" / "bundle.json"
        good = path.read_text()
        path.write_text(json.dumps(json.loads(good) | {key: value}))
        with pytest.raises(UserError, match="damaged"):
            Bundle.open(tmp_path / "bundle")
        path.write_text(good)


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch):
    monkeypatch.setattr("ldae.preprocessing.steps.find_spec", lambda name: None)
    with pytest.raises(BadScan, match=r"antspyx and deepbet not installed: pip install 'ldae\[preprocess\]'"):
        TrainingPreprocessing(Transform((8, 8, 8), 9.0))(brain())


@pytest.mark.skipif(not HEAD.exists(), reason=f"no real scans at {SHARED / 'data'}")
def test_a_change_in_the_brain_of_a_whole_head_comes_back_to_the_head():
    """Registration is coarse, for speed; the change makes the brain brighter by a tenth of the intensity range."""
    pytest.importorskip("ants", reason="antspyx is not installed: pip install 'ldae[preprocess]'")
    pytest.importorskip("deepbet", reason="deepbet is not installed: pip install 'ldae[preprocess]'")
    quick = PreprocessingSteps(
        None, registration=Registration(spacing=4.0, iterations=(30, 0)), limits=Limits(correlation=0.5)
    )
    transform = Transform((40, 48, 40), 4.5)
    affine = np.array([[4.5, 0, 0, -88.25], [0, 4.5, 0, -123.25], [0, 0, 4.5, -83.25], [0, 0, 0, 1]])
    scan = open_scan(HEAD, transform, None, TrainingPreprocessing(transform, quick.parameters(), affine), always=True)
    np.testing.assert_allclose(scan.prepared.affine, affine, atol=0.01)
    brighter = scan.volume + 0.1 * (scan.volume > 0.2)  # without voxels that are brain to a small part only
    edited, original = scan.edited(brighter, scan.volume), nib.load(HEAD)
    assert edited.shape == original.shape
    np.testing.assert_allclose(edited.affine, original.affine)
    change = edited.get_fdata() - original.get_fdata().reshape(edited.shape)
    scale = 0.1 * (scan.prepared.high - scan.prepared.low)
    volume = (change > scale / 2).sum() * np.prod(original.header.get_zooms()[:3]) / 1e6
    assert 1.0 < volume < 2.0  # litres: the volume of a brain, not of a head
    assert change.min() > -1e-3 * scale
    assert torch.isfinite(scan.volume).all()
