"""Proves preprocessing with ANTs and deepbet on a real scan: twenty broken copies are each rejected with the true
reason and do not stop the run; an intact one goes through every step, and its transforms work in both directions.

Skipped if antspyx, deepbet or the scans are missing. LDAE_SHARED gives the folder of the scans.
"""

import gzip
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from ldae.cli import main
from ldae.data.table import read_table
from ldae.preprocessing.check import compare_masks, dice_overlap
from ldae.preprocessing.registration import Transforms
from ldae.preprocessing.template import Icbm152, template_at_spacing, template_brain
from ldae.preprocessing.volume import Volume
from ldae.utils.files import read_json

pytest.importorskip("ants", reason="antspyx is not installed: pip install 'ldae[preprocess]'")
pytest.importorskip("deepbet", reason="deepbet is not installed: pip install 'ldae[preprocess]'")
SHARED = Path(os.environ.get("LDAE_SHARED", Path(__file__).parents[2] / "shared"))
IXI = SHARED / "data" / "ixi_hh"
SCAN = IXI / "sub-IXI012" / "anat" / "sub-IXI012_T1w.nii.gz"
LABELS = IXI / "derivatives" / "dlmuse" / "sub-IXI012" / "anat" / "sub-IXI012_dseg.nii.gz"
pytestmark = pytest.mark.skipif(not SCAN.exists(), reason=f"no real scans at {SHARED / 'data'}")

QUICK = (
    "--bias",
    "none",
    "--set",
    "preprocess.registration.iterations=[30,0]",
    "--set",
    "preprocess.registration.spacing=4",
)


def ldae(*arguments, exit_code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == exit_code, result.output
    return result


def place(root, subject, session=""):
    """Path of a scan in a BIDS dataset; its folder is created."""
    stem = f"sub-{subject}_{session}_T1w.nii.gz" if session else f"sub-{subject}_T1w.nii.gz"
    folder = root / f"sub-{subject}" / session / "anat"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / stem


def broken_images():
    """Broken copies of the scan: name -> (image, part of the expected reason)."""
    real = nib.load(SCAN)
    data, affine = np.asarray(real.dataobj, dtype=np.float32), real.affine

    def image(array, matrix=affine):
        return nib.Nifti1Image(np.asarray(array), matrix)

    def changed(value, everywhere=False):
        copy = data.copy()
        copy[tuple(slice(None) if everywhere else slice(3, 6) for _ in range(3))] = value
        return image(copy)

    no_affine = image(data, None)
    no_affine.set_sform(None, 0)
    no_affine.set_qform(None, 0)
    flat = affine.copy()
    flat[:3, 1] = flat[:3, 0]
    sheared = affine.copy()
    sheared[:3, 1] += 0.5 * affine[:3, 0]
    centre = np.array(data.shape) / 2
    distance = 2.0 * np.sqrt(((np.moveaxis(np.indices(data.shape), 0, -1) - centre) ** 2).sum(-1))  # mm
    # Bright at the edge and dark inside, unlike a brain.
    hollow = np.where(distance < 68, 1 + (distance / 68) ** 4 * 200, 0)
    return {
        "fourD": (image(np.stack([data, data], -1)), "not one 3-D volume"),
        "fourDlong": (image(np.repeat(data[..., None], 5, -1).astype(np.uint8)), "not one 3-D volume"),
        "slice": (image(data[:, :, 40]), "not one 3-D volume"),
        "thin": (image(data[:, :, 40:41]), "not a volume"),
        "zero": (changed(0, everywhere=True), "all voxels are zero"),
        "constant": (changed(7, everywhere=True), "all voxels are equal"),
        "nan": (changed(np.nan), "NaN"),
        "infinite": (changed(np.inf), "infinite"),
        "complex": (image(data.astype(np.complex64)), "not real numbers"),
        "noaffine": (no_affine, "no affine"),
        "degenerate": (image(data, flat), "degenerate"),
        "sheared": (image(data, sheared), "shears"),
        "metres": (image(data, affine @ np.diag([1e-2, 1e-2, 1e-2, 1])), "voxel size"),
        "huge": (image(data, affine @ np.diag([10, 10, 10, 1])), "voxel size"),
        "cropped": (image(data[40:60, 40:60, 30:50]), "field of view"),
        "small": (image(np.where(distance < 40, data, 0)), "brain volume"),
        "hollow": (image(hollow.astype(np.float32)), "template correlation"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def twenty(tmp_path_factory):
    """Output folder of a run on twenty broken scans, and part of the expected reason for each."""
    root, out = (tmp_path_factory.mktemp("broken") / name for name in ("raw", "out"))
    reasons = {}
    for name, (image, reason) in broken_images().items():
        nib.save(image, place(root, name))
        reasons[place(root, name).name] = reason
    content = SCAN.read_bytes()
    place(root, "truncated").write_bytes(content[: len(content) // 2])
    place(root, "text").write_bytes(gzip.compress(b"no NIfTI at all" * 1000))
    place(root, "empty").write_bytes(b"")
    reasons |= {place(root, name).name: "unreadable" for name in ("truncated", "text", "empty")}
    assert len(reasons) == 20
    ldae("preprocess", root, out, "-j", 1, *QUICK, exit_code=2)  # none of them is usable
    return out, reasons


def test_twenty_broken_scans_are_each_rejected_with_the_true_reason(twenty):
    out, reasons = twenty
    rejected = pd.read_csv(out / "rejected.csv")
    found = {Path(path).name: reason for path, reason in zip(rejected["path"], rejected["reason"], strict=True)}
    assert found.keys() == reasons.keys()
    wrong = {name: found[name] for name, part in reasons.items() if part not in found[name]}
    assert not wrong
    assert not list(out.rglob("*_desc-preproc_T1w.nii.gz"))
    text = (out / "qc.html").read_text()
    assert all(name.split("_")[0] in text for name in reasons)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Output folder of a run on one intact scan with its label map, at 3 mm."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copyfile(SCAN, place(folder / "raw", "IXI012"))
    (folder / "raw" / "participants.tsv").write_text("participant_id\tage\tsex\nsub-IXI012\t38.78\tM\n")
    ldae("preprocess", folder / "raw", folder / "out", "-j", 1, "--spacing", 3, "--labels", LABELS.parent,
         "--set", "preprocess.bias.iterations=[5]")  # fmt: skip
    return folder / "out"


def test_a_real_scan_goes_through_every_step(whole):
    table = read_table(whole / "scans.csv")
    row = table.iloc[0]
    assert (row["subject"], row["session"], row["age"], row["sex"]) == ("sub-IXI012", "ses-M000", 38.78, "M")
    sidecar = read_json(next(Path(row["path"]).parent.glob("*desc-preproc_T1w.json")))
    assert row["affine_determinant"] == pytest.approx(np.linalg.det(np.array(sidecar["TemplateToNative"])[:3, :3]))
    assert row["template_correlation"] > 0.8  # 0.84 with five iterations of N4 at 3 mm; 0.89 to 0.93 by default
    assert row["ventricle_mm3"] < row["brain_mm3"] < 1.15 * row["head_mm3"]
    scan, grid = Volume.read(row["path"]), template_at_spacing(Icbm152(), 3.0)
    assert scan.data.shape == grid.data.shape
    assert (
        dice_overlap(scan.data > 0, template_brain(grid)) > 0.93
    )  # after affine registration, size and position are the template's
    raw = nib.load(SCAN)
    mask = nib.load(whole / "sub-IXI012" / "anat" / "sub-IXI012_desc-brain_mask.nii.gz")
    assert mask.shape == raw.shape
    assert np.allclose(mask.affine, raw.affine, atol=1e-4)
    assert compare_masks(whole, LABELS.parent)["dice"][0] > 0.95
    assert "data:image/jpeg" in (whole / "qc.html").read_text()


def test_a_mask_goes_to_the_template_and_back(whole):
    folder, files = whole, read_json(whole / "records" / "sub-IXI012.json")["files"]
    transforms = Transforms.from_record(folder, files)
    native, moved = (Volume.read_labels(folder / files[name]) for name in ("native_mask", "mask"))
    back = transforms.to_native(moved, native, "linear")
    assert dice_overlap(back.data > 0.5, native.data > 0) > 0.96
    # The matrix in the sidecar (template mm to native mm) agrees.
    sidecar = read_json(folder / files["scan"].replace(".nii.gz", ".json"))
    inside = nib.affines.apply_affine(moved.affine, np.argwhere(moved.data > 0))
    points = nib.affines.apply_affine(np.array(sidecar["TemplateToNative"]), inside)
    voxels = nib.affines.apply_affine(np.linalg.inv(native.affine), points).round().astype(int)
    assert native.data[tuple(voxels.T)].mean() > 0.96


def test_label_maps_are_resampled_as_by_ants(whole):
    import ants

    files = read_json(whole / "records" / "sub-IXI012.json")["files"]
    transforms, grid = Transforms.from_record(whole, files), Volume.read(whole / files["scan"])
    atlas = Volume.read_labels(LABELS)
    few = atlas.with_data(np.where(np.isin(atlas.data, [47, 48, 51, 52]), atlas.data, atlas.data > 0))
    theirs = ants.apply_transforms(
        grid.to_ants(), few.to_ants(), [str(path) for path in transforms.forward], interpolator="genericLabel"
    ).numpy()
    assert set(np.unique(theirs)) == {0, 1, 47, 48, 51, 52}
    # Where two labels have equal weights, either may be chosen.
    assert (transforms.labels_to_template(few, grid).data != theirs).sum() <= 2
    written = Volume.read_labels(whole / files["labels"]).data
    assert (written != transforms.labels_to_template(atlas, grid).data).sum() == 0
    assert np.isin([47, 48, 51, 52], np.unique(written)).all()


def test_the_same_command_again_keeps_the_finished_scan(whole, tmp_path):
    stamp = (whole / "records" / "sub-IXI012.json").stat().st_mtime_ns
    raw = whole.parent / "raw"
    ldae("preprocess", raw, whole, "-j", 1, "--spacing", 3, "--labels", LABELS.parent,
         "--set", "preprocess.bias.iterations=[5]")  # fmt: skip
    assert (whole / "records" / "sub-IXI012.json").stat().st_mtime_ns == stamp
