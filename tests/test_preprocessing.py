"""Proves preprocessing without ANTs: finding scans and participants, names, tables, resumption, limits, quality.

The scans are synthetic: an ellipsoid of tissue on a background of 0, as in a skull-stripped scan.
"""

import errno
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hydra.utils import instantiate

from ldae.commands.preprocess_folder import compose_steps
from ldae.data.nifti import BadScan
from ldae.data.table import read_table
from ldae.preprocessing.brain import Stripped, close_sulci, is_skull_stripped
from ldae.preprocessing.intensity import Tissues, WhiteMatter
from ldae.preprocessing.measures import Limits, correlate_with_template, estimate_noise
from ldae.preprocessing.participants import Columns, Participants
from ldae.preprocessing.quality import deviation_scores
from ldae.preprocessing.regions import Regions, find_label_maps
from ldae.preprocessing.sources import SourceScan, find_scans
from ldae.preprocessing.steps import PreprocessingSteps
from ldae.preprocessing.template import resample
from ldae.preprocessing.volume import Volume
from ldae.utils.errors import UserError
from ldae.utils.files import read_json
from ldae.utils.renamed import with_present_names
from small_datasets import bids, brain, run


def test_a_bids_folder_becomes_a_table_that_training_reads(tmp_path):
    table = "participant_id age sex group\nsub-1 61.5 male AD\nsub-2 n/a F n/a\n"
    root = bids(tmp_path / "raw", {"sub-1/ses-M000": brain(), "sub-1/ses-M012": brain(), "sub-2": brain()}, table)
    (root / "sub-1" / "sub-1_sessions.tsv").write_text("session_id\tdiagnosis\nses-M012\tMCI\n")
    run(root, tmp_path / "out")
    table = read_table(tmp_path / "out" / "scans.csv")
    assert table["session"].tolist() == ["ses-M000", "ses-M012", "ses-M000"]
    assert table["diagnosis"].tolist() == ["AD", "MCI", ""]
    assert table["age"].tolist()[:2] == [61.5, 62.5]  # at the session
    assert np.isnan(table["age"][2])
    assert table["sex"].tolist() == ["M", "M", "F"]
    assert all(Path(path).is_file() for path in table["path"])
    assert 1.0e6 < table["head_mm3"][0] < 1.6e6
    raw = (tmp_path / "out" / "scans.csv").read_text()
    assert str(tmp_path) not in raw  # the folder can move
    assert "sub-2" in (tmp_path / "out" / "qc.html").read_text()


def test_a_second_run_repeats_only_scans_with_other_content_parameters_or_missing_files(tmp_path):
    root = bids(tmp_path / "raw", {"sub-1": brain(), "sub-2": brain()})
    out = tmp_path / "out"

    def stamps(**options):
        run(root, out, **options)
        return [(out / "records" / f"sub-{n}.json").stat().st_mtime_ns for n in (1, 2)]

    first = stamps()
    assert stamps() == first
    bids(root, {"sub-2": brain(seed=5)})
    second = stamps()
    assert second[0] == first[0]
    assert second[1] != first[1]
    third = stamps(steps=PreprocessingSteps(bias=None, brain=Stripped(), registration=None, spacing=5.0))
    assert not set(third) & set(second)
    (out / "sub-1" / "anat" / "sub-1_res-5mm_desc-preproc_T1w.nii.gz").unlink()
    assert stamps(steps=PreprocessingSteps(bias=None, brain=Stripped(), registration=None, spacing=5.0))[0] != third[0]


def test_a_scan_that_is_rejected_later_leaves_no_output(tmp_path):
    root = bids(tmp_path / "raw", {"sub-1": brain(), "sub-2": brain()})
    run(root, tmp_path / "out")
    bids(root, {"sub-1": brain(half=(20, 20, 20))})
    table = run(root, tmp_path / "out")
    assert table["subject"].tolist() == ["sub-2"]
    rejected = pd.read_csv(tmp_path / "out" / "rejected.csv")
    assert "brain volume" in rejected["reason"][0]
    assert not list((tmp_path / "out" / "sub-1").rglob("*.nii.gz"))


def test_a_full_disk_stops_in_one_line_and_the_next_run_continues(tmp_path, monkeypatch):
    root = bids(tmp_path / "raw", {f"sub-{n}": brain() for n in range(3)})
    write, written = Volume.write, []

    def full(self, path, dtype=np.float32):
        written.append(path)
        if len(written) == 6:  # the third file of the second scan
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, path, dtype)

    monkeypatch.setattr(Volume, "write", full)
    with pytest.raises(UserError, match="No space left"):
        run(root, tmp_path / "out")
    assert len(read_table(tmp_path / "out" / "scans.csv")) == 1
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    monkeypatch.setattr(Volume, "write", write)
    first = tmp_path / "out" / "records" / "sub-0.json"
    written_at = first.stat().st_mtime_ns
    assert len(run(root, tmp_path / "out")) == 3
    assert first.stat().st_mtime_ns == written_at


def test_an_interrupt_leaves_tables_of_the_finished_scans(tmp_path, monkeypatch):
    root = bids(tmp_path / "raw", {f"sub-{n}": brain() for n in range(3)})

    def interrupted(function, items, *arguments, **options):
        yield 0, function(*items[0])
        raise KeyboardInterrupt

    run(root, tmp_path / "out")
    monkeypatch.setattr("ldae.preprocessing.preprocess_cohort.run_in_processes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "out")
    assert len(read_table(tmp_path / "out" / "scans.csv")) == 3  # the earlier run had finished all


def test_sessions_that_are_not_in_months_need_ages(tmp_path):
    root = bids(tmp_path / "raw", {"sub-1/ses-01": brain(), "sub-2/ses-01": brain(), "sub-2/ses-02": brain()})
    run(root, tmp_path / "out")
    table = read_table(tmp_path / "out" / "scans.csv")
    assert list(zip(table["subject"], table["months"], strict=True)) == [("sub-1", 0), ("sub-2", 0)]
    rejected = pd.read_csv(tmp_path / "out" / "rejected.csv")
    assert rejected["session"].tolist() == ["ses-02"]
    assert "the time of its session ses-02 is unknown" in rejected["reason"][0]
    (root / "sub-2" / "sub-2_sessions.tsv").write_text("session_id\tage\nses-01\t70\nses-02\t71.5\n")
    run(root, tmp_path / "out")
    table = read_table(tmp_path / "out" / "scans.csv")
    assert table["months"].tolist() == [0, 0, 18]
    assert table["age"].tolist()[1:] == [70, 71.5]


def test_scans_of_caps_trees_and_csv_tables_are_found(tmp_path):
    folder = tmp_path / "caps" / "subjects" / "sub-A" / "ses-M006" / "t1_linear"
    whole, crop = (f"sub-A_ses-M006_space-MNI_{part}res-1x1x1_T1w.nii.gz" for part in ("", "desc-Crop_"))
    for name in (whole, crop):
        brain().write(folder / name)
    found = find_scans(tmp_path / "caps")
    assert [(s.path.name, s.subject, s.session, s.problem) for s in found] == [(whole, "sub-A", "ses-M006", "")]
    (tmp_path / "list.csv").write_text(f"path,subject,session,age\n{folder / crop},0012,12,70\nother.nii.gz,x_1,,\n")
    scans = find_scans(tmp_path / "list.csv")
    assert [(s.subject, s.session) for s in scans] == [("sub-0012", "ses-M012"), ("sub-x1", "")]
    assert Participants(None, Columns()).look_up_all(scans)[0].age == 70
    (tmp_path / "list.csv").write_text("path,subject\na.nii,x_1\nb.nii,x1\n")
    with pytest.raises(UserError, match="line 3"):
        find_scans(tmp_path / "list.csv")


def test_label_maps_become_region_volumes_in_native_mm3(tmp_path):
    labels = np.zeros((10, 10, 10), np.float32)
    labels[:2], labels[2, :3] = 51, 47
    volume = Volume(labels, np.diag([2.0, 2, 1, 1]))
    found = Regions({"ventricle": [51, 52], "hippocampus": [47, 48]}).volumes(volume)
    assert found["ventricle_mm3"] == found["label_051_mm3"] == 200 * 4
    assert found["hippocampus_mm3"] == 30 * 4
    assert found["brain_mm3"] == 230 * 4
    for name in ("sub-1_dseg.nii.gz", "x/sub-2_ses-M000_dseg.nii.gz"):
        volume.write(tmp_path / name)
    assert set(find_label_maps(tmp_path)) == {("1", ""), ("2", "M000")}
    volume.write(tmp_path / "y" / "sub-1_dseg.nii.gz")
    with pytest.raises(UserError, match="two label maps"):
        find_label_maps(tmp_path)


def test_closing_a_mask_fills_sulci_and_adds_little_else():
    scan = brain(half=(60, 60, 60), shape=(40, 40, 40))
    with_sulcus = scan.data.copy()
    with_sulcus[20, :12] = 0  # a sulcus of 4 mm, open to the outside
    mask = close_sulci(with_sulcus > 0, scan.spacing)
    assert mask[20, 10, 20]
    assert (mask & (scan.data == 0)).sum() < 0.05 * mask.sum()
    assert is_skull_stripped(scan)
    assert not is_skull_stripped(brain(half=(100, 120, 100), shape=(60, 70, 60)))


def test_resampling_keeps_position_and_sum():
    scan = brain(spacing=2.0, shape=(88, 104, 80))
    coarse = resample(scan, 4.0)
    assert np.allclose(coarse.spacing, 4.0)
    for volume in (scan, coarse):
        centre = np.average(np.indices(volume.data.shape).reshape(3, -1), axis=1, weights=volume.data.ravel())
        assert np.abs(nib.affines.apply_affine(volume.affine, centre)).max() < 0.5
    assert coarse.data.sum() * 64 == pytest.approx(scan.data.sum() * 8, rel=0.01)
    assert resample(scan, None) is scan


def test_tissue_means_become_the_targets_at_any_scale():
    scan = brain(spacing=3.0, shape=(60, 70, 54))
    mask = scan.data > 0
    for factor in (1, 7):
        data = Tissues(targets=(0.3, 0.7, 1.0))(factor * scan.data, mask)
        found = [np.median(data[np.abs(scan.data - level) < 3]) for level in (25, 70, 100)]
        assert found == pytest.approx([0.3, 0.7, 1.0], abs=0.03)
        white = WhiteMatter()(factor * scan.data, mask)
        assert np.median(white[np.abs(scan.data - 100) < 3]) == pytest.approx(1, abs=0.02)
    with pytest.raises(BadScan, match="three tissues"):
        WhiteMatter()(np.ones((5, 5, 5)), np.ones((5, 5, 5), bool))


def test_noise_correlation_and_limits_on_known_scans():
    scan = brain(spacing=2.0, shape=(88, 104, 80))
    mask = scan.data > 0
    assert estimate_noise(scan, mask) == pytest.approx(2 / np.median(scan.data[mask]), rel=0.15)
    shifted = scan.with_data(np.roll(scan.data, 10, axis=1))
    assert correlate_with_template(scan, scan) == pytest.approx(1)
    assert correlate_with_template(shifted, scan) < 0.8
    assert correlate_with_template(scan.with_data(0 * scan.data), scan) == 0
    for bad in (0.01, 30.0):
        with pytest.raises(BadScan, match="voxel size"):
            Limits().check_grid(Volume(scan.data, np.diag([bad, bad, bad, 1])))
    for value, rigid in ((0.68, False), (0.39, True)):
        with pytest.raises(BadScan, match="template correlation"):
            Limits().check_correlation(value, rigid)
    Limits().check_correlation(0.68, rigid=True)  # a small head that is registered well


def test_the_quality_page_sorts_rejected_scans_first_then_by_deviation():
    def record(correlation, status="done"):
        return {"status": status, "measures": {"template_correlation": correlation, "head_mm3": 1.4e6, "noise": 0.05}}

    scores = deviation_scores([record(0.9), record(0.91), record(0.7), record(0.92), record(0.9, "rejected")])
    assert np.argsort(-scores, kind="stable")[:2].tolist() == [4, 2]


def test_incompatible_steps_and_unknown_options_are_refused():
    with pytest.raises(UserError, match="brain extraction"):
        PreprocessingSteps(brain=None)
    with pytest.raises(UserError, match="mask"):
        PreprocessingSteps(brain=None, registration=None, intensity=WhiteMatter())
    for wrong in ("preprocess/registration=nonlinear", "preprocess.spacingg=2", "+preprocess.brain.thresh=1"):
        with pytest.raises(UserError, match=wrong.split("=")[0].split(".")[-1].split("/")[-1]):
            compose_steps([wrong])


def test_a_scan_of_an_unlisted_participant_has_empty_data(tmp_path):
    participant = Participants(tmp_path, Columns()).look_up_all([SourceScan(Path("x"), "sub-9", "")])[0]
    assert (participant.months, participant.diagnosis, participant.sex) == (0, "", "")
    assert np.isnan(participant.age)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ([], "72ac9ef7c2b3c883"),
        (
            ["preprocess/registration=syn", "preprocess/brain=stripped", "preprocess/intensity=tissues"],
            "4c77bdfe18fba0f0",
        ),
        (["preprocess/registration=none", "preprocess/bias=none", "preprocess.spacing=null"], "2fd3975175fe594d"),
    ],
)
def test_keys_of_parameters_stay_so_that_finished_scans_are_kept(overrides, key):
    steps = instantiate(compose_steps(overrides), _convert_="all")
    assert steps.pop("regions") == Regions(
        {"ventricle": [49, 50, 51, 52], "hippocampus": [47, 48], "amygdala": [31, 32]}
    )
    assert steps.pop("columns") == Columns()
    assert PreprocessingSteps(**steps).key() == key


def test_configs_with_earlier_class_paths_are_read():
    stored = {"_target_": "ldae.preprocessing.people.Columns", "age": ["years"]}
    assert instantiate(with_present_names(stored), _convert_="all") == Columns(age=["years"])


def test_the_sidecar_has_parameters_and_versions(tmp_path):
    run(bids(tmp_path / "raw", {"sub-1": brain()}), tmp_path / "out")
    sidecar = read_json(tmp_path / "out" / "sub-1" / "anat" / "sub-1_res-4mm_desc-preproc_T1w.json")
    assert sidecar["Parameters"]["brain"]["step"] == "Stripped"
    assert sidecar["SkullStripped"] is True
    assert {"numpy", "ldae"} <= sidecar["Software"].keys()


def test_without_registration_each_mask_is_on_its_own_grid(tmp_path):
    steps = PreprocessingSteps(bias=None, brain=Stripped(), registration=None, spacing=6.5)
    run(bids(tmp_path / "raw", {"sub-1": brain()}), tmp_path / "out", steps)
    anat = tmp_path / "out" / "sub-1" / "anat"
    scan, mask, native = (
        nib.load(anat / f"sub-1_{name}.nii.gz")
        for name in ("res-6p5mm_desc-preproc_T1w", "res-6p5mm_desc-brain_mask", "desc-brain_mask")
    )
    assert scan.shape == mask.shape
    assert native.shape == brain().data.shape


def test_sessions_of_a_caps_tree_are_found_beside_the_participants_file(tmp_path):
    (tmp_path / "bids" / "sub-A").mkdir(parents=True)
    (tmp_path / "bids" / "participants.tsv").write_text("participant_id\tage\nsub-A\t70\n")
    (tmp_path / "bids" / "sub-A" / "sub-A_sessions.tsv").write_text("session_id\tdiagnosis\nses-M006\tMCI\n")
    participants = Participants(tmp_path / "caps", Columns(), tmp_path / "bids" / "participants.tsv")
    participant = participants.look_up_all([SourceScan(Path("x"), "sub-A", "ses-M006")])[0]
    assert (participant.age, participant.diagnosis) == (70.5, "MCI")
