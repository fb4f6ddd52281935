"""Proves that a raw scan goes through the steps that the training scans went through, lands on their grid, and that
what is changed there comes back to the raw scan's own voxels and intensities.

Without ANTs: registration is a shift by whole voxels, with a file as ANTs' transforms have. One test, skipped where
antspyx, deepbet or the scans are missing, does the same with a whole head.
"""

import gc
import json
import os
from dataclasses import dataclass
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
from test_scan import brain

SHARED = Path(os.environ.get("LDAE_SHARED", Path(__file__).parents[2] / "shared"))
HEAD = SHARED / "data" / "ds000011" / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
SHIFT = 12.0  # mm from the scan to the "template"
ANY = Limits(field_mm=(10, 1e3), brain_cm3=(1, 1e4), correlation=-1.0)


@dataclass(frozen=True)
class Shift:
    """What ANTs leaves, for a shift along x."""

    file: Path

    def to_template(self, scan, grid, interpolator):
        return resample_onto(Volume(scan.data, self._moved(scan.affine, SHIFT)), grid)

    def to_native(self, volume, grid, interpolator):
        assert self.file.exists()
        return resample_onto(Volume(volume.data, self._moved(volume.affine, -SHIFT)), grid)

    @staticmethod
    def _moved(affine, shift):
        return affine + np.outer([shift, 0, 0, 0], [0, 0, 0, 1])


def steps(template, bias=lambda scan: scan.with_data(2 * scan.data)):
    """A pipeline that doubles intensities and shifts."""

    def register(brain, fixed, folder):
        (folder / "shift").write_text("12 mm")
        return Shift(folder / "shift")

    register.spacing, register.transform = 4.0, "Shift"
    return PreprocessingSteps(bias, Stripped(), register, template, limits=ANY, spacing=4.0)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """A scan, its twin in the template's place, and the steps from one to the other for a model of 9 mm."""
    image = brain()
    placed = nib.Nifti1Image(np.asarray(image.dataobj), Shift._moved(image.affine, SHIFT))
    nib.save(placed, tmp_path / "template.nii.gz")
    transform = Transform((16, 16, 16), 9.0)
    monkeypatch.setattr(TrainingPreprocessing, "_check_installed", lambda self: None)
    scans = TrainingPreprocessing(transform, {}, transform.to_model_space(placed).affine)
    scans.__dict__["pipeline"] = steps(TemplateFile(str(tmp_path / "template.nii.gz")))
    return image, placed, scans


def test_a_raw_scan_lands_where_the_training_scans_lie(raw):
    image, placed, scans = raw
    made = scans(image)
    prepared = scans.transform.to_model_space(made.image)
    np.testing.assert_allclose(prepared.affine, scans.affine, atol=0.01)
    twin = scans.transform.to_model_space(placed).volume
    assert np.corrcoef(prepared.volume.ravel(), twin.ravel())[0, 1] > 0.99


def test_another_box_around_the_template_is_the_training_scans_box(raw):
    """The training scans' grid lies 18 mm lower than the transform alone would put the scan."""
    image, _, scans = raw
    moved = np.array(scans.affine)
    moved[2, 3] -= 18.0
    other = TrainingPreprocessing(scans.transform, {}, moved)
    other.__dict__["pipeline"] = scans.pipeline
    volumes = [s.transform.to_model_space(s(image).image) for s in (scans, other)]
    np.testing.assert_allclose(volumes[1].affine, moved, atol=0.01)
    middle = [np.argwhere(v.volume[0] > 0.1).mean(0) for v in volumes]
    np.testing.assert_allclose(middle[1] - middle[0], [0, 0, 2], atol=0.35)


def test_a_change_comes_back_to_the_raw_scans_voxels_and_intensities(raw):
    """The transforms' files last as long as the scan, and no longer."""
    image, _, scans = raw
    scan = open_scan(image, scans.transform, None, scans, always=True)
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
    folder = scan.back.__closure__[1].cell_contents.back.args[0].path
    assert folder.exists()
    del scan
    gc.collect()
    assert not folder.exists()


def test_parameters_survive_being_written(tmp_path):
    pipeline = PreprocessingSteps(N4(shrink=2), Stripped(), Registration("Rigid"), Icbm152(), Tissues(), Limits(), 2.0)
    assert PreprocessingSteps.from_parameters(json.loads(json.dumps(pipeline.parameters()))) == pipeline
    assert pipeline.summary == "N4, Stripped, Rigid to MNI152NLin2009aSym, 2 mm, Tissues"
    for damage in ({"bias": {"step": "os.system"}}, {"nothing": 1}, {"bias": {"step": "N4", "command": 1}}):
        with pytest.raises(UserError, match="damaged"):
            PreprocessingSteps.from_parameters(pipeline.parameters() | damage)


def write_scans(folder, parameters):
    """Scans with sidecars of these parameters, one after another."""
    paths = []
    for number, value in enumerate(parameters):
        path = folder / f"sub-{number}_T1w.nii.gz"
        nib.save(brain(number), path)
        path.with_name(f"sub-{number}_T1w.json").write_text(json.dumps(value))
        paths.append(str(path))
    return paths


def test_what_is_recorded_of_the_training_scans(tmp_path):
    ours, other = ({"Parameters": PreprocessingSteps(spacing=size).parameters()} for size in (1.5, 2.0))
    paths = write_scans(tmp_path, [ours, ours, other, {"Parameters": "someone else's"}])
    assert read_recorded_parameters(paths[:2]) == ours["Parameters"]
    assert read_recorded_parameters(paths[:3]) is None
    assert read_recorded_parameters(paths[3:]) is None
    own = PreprocessingSteps(template=TemplateFile(str(tmp_path / "mine.nii.gz"))).parameters()
    told = read_recorded_parameters(write_scans(tmp_path, [{"Parameters": own}]))
    assert told["template"]["path"] == "mine.nii.gz"
    with pytest.raises(BadScan, match=r"template of their own, mine.nii.gz"):
        TrainingPreprocessing(Transform((8, 8, 8), 9.0), told)(brain())
    transform = Transform((8, 8, 8), 9.0)
    np.testing.assert_array_equal(common_affine(paths, transform), transform.to_model_space(brain()).affine)
    nib.save(nib.Nifti1Image(np.asarray(brain().dataobj)[1:], brain().affine), paths[1])
    assert common_affine(paths, transform) is None


def test_the_steps_and_the_grid_travel_with_the_model(tmp_path):
    about = {"preprocess": PreprocessingSteps(spacing=2.0).parameters(), "affine": np.diag([9.0, 9, 9, 1]).tolist()}
    run = small_run(tmp_path / "run", about=about)
    Bundle.from_run(run).save(tmp_path / "bundle")
    for bundle in (Bundle.from_run(run), Bundle.open(tmp_path / "bundle")):
        assert bundle.preprocess == json.loads(json.dumps(about["preprocess"]))
        assert bundle.affine == about["affine"]
    assert "N4, DeepBet" in (tmp_path / "bundle" / "README.md").read_text()
    for key, value in (("affine", [[1, 2]]), ("affine", "no"), ("preprocess", 3)):
        path = tmp_path / "bundle" / "bundle.json"
        good = path.read_text()
        path.write_text(json.dumps(json.loads(good) | {key: value}))
        with pytest.raises(UserError, match="damaged"):
            Bundle.open(tmp_path / "bundle")
        path.write_text(good)


def test_a_missing_package_is_named_with_what_to_type(monkeypatch):
    monkeypatch.setattr("ldae.scans.raw_scan.find_spec", lambda name: None)
    with pytest.raises(BadScan, match=r"antspyx and deepbet not installed: pip install 'ldae\[preprocess\]'"):
        TrainingPreprocessing(Transform((8, 8, 8), 9.0))(brain())


@pytest.mark.skipif(not HEAD.exists(), reason=f"no real scans at {SHARED / 'data'}")
def test_a_whole_head_goes_there_and_back():
    """A coarse and quick registration; the change is a tenth more brightness everywhere in the brain."""
    pytest.importorskip("ants", reason="antspyx is not installed: pip install 'ldae[preprocess]'")
    pytest.importorskip("deepbet", reason="deepbet is not installed: pip install 'ldae[preprocess]'")
    quick = PreprocessingSteps(
        None, registration=Registration(spacing=4.0, iterations=(30, 0)), limits=Limits(correlation=0.5)
    )
    transform = Transform((40, 48, 40), 4.5)
    affine = np.array([[4.5, 0, 0, -88.25], [0, 4.5, 0, -123.25], [0, 0, 4.5, -83.25], [0, 0, 0, 1]])
    scan = open_scan(HEAD, transform, None, TrainingPreprocessing(transform, quick.parameters(), affine), always=True)
    np.testing.assert_allclose(scan.prepared.affine, affine, atol=0.01)
    brighter = scan.volume + 0.1 * (scan.volume > 0.2)  # not what is brain in a small part only
    edited, original = scan.edited(brighter, scan.volume), nib.load(HEAD)
    assert edited.shape == original.shape
    np.testing.assert_allclose(edited.affine, original.affine)
    change = edited.get_fdata() - original.get_fdata().reshape(edited.shape)
    scale = 0.1 * (scan.prepared.high - scan.prepared.low)
    volume = (change > scale / 2).sum() * np.prod(original.header.get_zooms()[:3]) / 1e6
    assert 1.0 < volume < 2.0  # litres: the brain, not the head
    assert change.min() > -1e-3 * scale
    assert torch.isfinite(scan.volume).all()
