"""Proves that a synthetic cohort does not depend on the number of processes, is continued after an interruption, and is
not mixed with another cohort."""

import hashlib
import subprocess
import sys

import nibabel
import numpy as np
import pandas as pd
import pytest

from ldae.data.phantom import draw_table, make_cohort, render
from ldae.utils.errors import UserError

SIZE = {"subjects": 5, "seed": 3, "spacing": 9.0, "shape": (24, 24, 24)}


def hashes(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    out = tmp_path_factory.mktemp("phantoms")
    return make_cohort(out, **SIZE, workers=1, progress=False)


def test_the_table_agrees_with_the_scans_and_with_the_drawn_labels(cohort):
    table, drawn = pd.read_csv(cohort), draw_table(5, 3)
    assert {"path", "labels_path", *drawn.columns} == set(table.columns)
    labels = ["subject", "session", "diagnosis", "age", "sex", "scanner", "severity"]
    assert table[labels].equals(drawn[labels])
    for _, scan in table.iterrows():
        image = nibabel.load(cohort.parent / scan.path)
        regions = np.asarray(nibabel.load(cohort.parent / scan.labels_path).dataobj)
        assert image.shape == regions.shape == (24, 24, 24)
        assert image.header.get_zooms() == (9, 9, 9)
        volume = np.asarray(image.dataobj)
        assert volume.max() > 100
        assert ((volume > 0) == (regions > 0)).all()
    again = render(table.iloc[-1], spacing=9.0, shape=(24, 24, 24))
    assert (np.rint(again.image) == volume).all()
    assert table.iloc[-1].ventricle_mm3 == pytest.approx(again.volumes["ventricle"], abs=0.06)


def test_visits_at_chosen_months_are_of_the_same_subjects(cohort, tmp_path):
    """The first visit is the same scan, whatever the months; later ones are those that `render` makes of their rows."""
    months = make_cohort(tmp_path / "a", **{**SIZE, "subjects": 1}, workers=1, progress=False, months=[0, 36, 72])
    table, first = pd.read_csv(months), pd.read_csv(cohort).iloc[0]
    assert table["session"].tolist() == ["ses-M000", "ses-M036", "ses-M072"]
    assert (table["age"] - first.age).tolist() == pytest.approx([0, 3, 6], abs=0.01)
    assert (months.parent / table["path"][0]).read_bytes() == (cohort.parent / first.path).read_bytes()
    assert table["ventricle_mm3"].is_monotonic_increasing
    again = render(table.iloc[2], spacing=9.0, shape=(24, 24, 24)).volumes["ventricle"]
    assert table["ventricle_mm3"][2] == pytest.approx(again, abs=0.06)
    with pytest.raises(UserError, match=r"another phantom cohort.*months"):
        make_cohort(tmp_path / "a", **{**SIZE, "subjects": 1}, workers=1, progress=False, months=[0, 12])
    with pytest.raises(UserError, match="must increase"):
        make_cohort(tmp_path / "b", **SIZE, workers=1, progress=False, months=[12, 0])


def test_two_processes_make_the_same_files_from_a_script_without_main_guard(cohort, tmp_path):
    # The script has no `if __name__ == "__main__"`, and the workers must not run it again.
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; from ldae.data.phantom import make_cohort; print('started')\n"
        f"make_cohort(sys.argv[1], **{SIZE!r}, workers=2)\n"
    )
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, script, out], capture_output=True, text=True, check=True)
    assert done.stdout.count("started") == 1
    assert hashes(out) == hashes(cohort.parent)


def test_a_complete_cohort_is_reused_and_an_interrupted_one_continued(cohort):
    folder, before = cohort.parent, hashes(cohort.parent)
    kept = folder / "sub-0001" / "scans.json"
    stamp = kept.stat().st_mtime_ns
    assert make_cohort(folder, **SIZE, progress=False) == cohort
    cohort.unlink()
    (folder / "sub-0002" / "scans.json").unlink()
    for path in (folder / "sub-0002").rglob("*_T1w.nii.gz"):
        path.unlink()
    make_cohort(folder, **SIZE, workers=1, progress=False)
    assert hashes(folder) == before
    assert kept.stat().st_mtime_ns == stamp


def test_a_folder_with_another_cohort_is_refused(cohort):
    with pytest.raises(UserError, match=r"another phantom cohort \(seed 3 not 4\)"):
        make_cohort(cohort.parent, **SIZE | {"seed": 4})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"subjects": 0}, "at least 1"),
        ({"spacing": 0.0}, "spacing"),
        ({"shape": (10, 10, 10)}, "field of view"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, wrong, message):
    with pytest.raises(UserError, match=message):
        make_cohort(tmp_path / "x", **SIZE | wrong)
    assert not (tmp_path / "x").exists()
