"""Tests the console script: help texts, images that overlay on the scan, tables that continue, one line per mistake."""

import csv
import gzip
import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from ldae.cli import COMMANDS, main
from ldae.commands.options import parse_numbers
from ldae.editing.direction import Direction
from ldae.editing.linear_model import LinearModel
from ldae.editing.units import Calibration, TrainingDistance
from ldae.utils.errors import UserError
from ldae.utils.locks import lock_file
from ldae.utils.resumable_csv import ResumableCsv
from small_scans import brain, reoriented

pytestmark = pytest.mark.usefixtures("no_worker_processes")


@pytest.fixture(scope="module")
def place(run, tmp_path_factory):
    """A folder with `runs/small`, two scans, one also in another orientation, a raw head and two unusable files."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(run, folder / "runs/small")
    nib.save(brain(0), folder / "a.nii.gz")
    nib.save(brain(1), folder / "b.nii.gz")
    nib.save(reoriented(brain(0), "PSR"), folder / "twin.nii.gz")
    nib.save(brain(size=3.0), folder / "head.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4, 3), np.int16), np.eye(4)), folder / "four.nii.gz")
    (folder / "text.nii.gz").write_text("no image")
    return folder


@pytest.fixture
def ldae(place, monkeypatch):
    """A function that runs a command in `place` and returns click's result."""
    monkeypatch.chdir(place)

    def run(*arguments, model=True):
        named = ["--run", "small", "--device", "cpu"] if model else []
        return CliRunner().invoke(main, [*map(str, arguments), *named])

    return run


def read_overlay(path, scan):
    """Check that an image has the shape and affine of a scan; returns its voxels."""
    image, original = nib.load(path), nib.load(scan)
    assert image.shape == original.shape
    np.testing.assert_array_equal(image.affine, original.affine)
    assert np.isfinite(image.get_fdata()).all()
    return image.get_fdata()


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_and_option_has_a_help_text(command):
    result = CliRunner().invoke(main, [command.name, "-h"])
    assert result.exit_code == 0
    # BIDS apps take input and output by place, and a cohort's output is a run.
    output = {"preprocess": "SOURCE OUTPUT", "cohort": "--name", "tables": "RUN"}.get(command.name, "-o, --output")
    assert output in result.output
    assert len(command.help.splitlines()[0]) > 10
    assert all(option.help for option in command.params if option.param_type_name == "option")


def test_help_names_the_unit_of_alpha():
    text = " ".join(CliRunner().invoke(main, ["manipulate", "-h"]).output.split())
    for said in ("mean distance between the two classes", "one standard deviation", "sqrt(768)", "ten years older"):
        assert said in text


def test_reconstructions_overlay_and_differ_with_the_code(ldae, place):
    assert ldae("reconstruct", "a.nii.gz", "-o", "out/r.nii.gz").exit_code == 0
    assert ldae("reconstruct", "-i", "a.nii.gz", "-o", "out/s.nii.gz", "--semantic").exit_code == 0
    full, semantic = (read_overlay(place / f"out/{name}.nii.gz", place / "a.nii.gz") for name in "rs")
    assert np.abs(full - semantic).max() > 1


def test_variants_are_equal_for_equal_seeds(ldae, place):
    assert ldae("vary", "a.nii.gz", "-n", 2, "--seed", 3, "-o", "v").exit_code == 0
    assert ldae("vary", "a.nii.gz", "-n", 1, "--seed", 3, "-o", "w").exit_code == 0
    first, second = (read_overlay(place / f"v/a_vary0{n}.nii.gz", place / "a.nii.gz") for n in (1, 2))
    again = read_overlay(place / "w/a_vary01.nii.gz", place / "a.nii.gz")
    np.testing.assert_allclose(first, again, atol=1e-2)
    assert np.abs(first - second).max() > 1


def test_interpolation_at_zero_is_the_first_scan(ldae, place):
    assert ldae("interpolate", "a.nii.gz", "b.nii.gz", "--at", "0,0.5", "-o", "i").exit_code == 0
    start, middle = (read_overlay(place / f"i/a_to_b_at{at}.nii.gz", place / "a.nii.gz") for at in ("0", "0.5"))
    np.testing.assert_array_equal(start, nib.load(place / "a.nii.gz").get_fdata())
    assert np.abs(middle - start).max() > 1


def test_manipulate_embeds_the_scan_once(ldae, monkeypatch):
    from ldae import LDAE

    embedded, embed = [], LDAE.embed
    monkeypatch.setattr(LDAE, "embed", lambda self, x: embedded.append(x) or embed(self, x))
    assert ldae("manipulate", "a.nii.gz", "--direction", "diagnosis", "--alpha", "1", "-o", "once").exit_code == 0
    assert len(embedded) == 3  # the scan, the volume decoded at alpha 0, and the edited volume


def test_manipulate_writes_an_image_per_alpha_and_prints_the_probes_predictions(ldae, place):
    arguments = ("--direction", "diagnosis", "--alpha", "-2,0,2", "-o", "m", "--viewer")
    for scan in ("a.nii.gz", "twin.nii.gz"):
        result = ldae("manipulate", scan, *arguments)
        assert result.exit_code == 0, result.output
    table = [line.split("\t") for line in result.stdout.splitlines() if "\t" in line]
    assert table[0] == ["alpha", "y moved", "image embedded anew"]
    assert [row[0] for row in table[1:]] == ["before", "-2", "+0", "+2"]
    assert result.stdout.splitlines()[0] == "alpha = 1: a step of sqrt(16) along the unit direction in standardised y"
    before = float(table[1][1].removeprefix("AD ").removesuffix(" %"))
    changes = [[float(x.removesuffix(" %")) for x in row[1].removeprefix("AD ").split(" -> ")] for row in table[2:]]
    assert [change[0] for change in changes] == [before] * 3
    less, same, more = (change[1] for change in changes)
    assert less <= before == same <= more
    assert less < more
    made = json.loads((place / "m/a_diagnosis+2.json").read_text())
    assert made["Alpha"] == 2
    assert made["AlphaUnit"].startswith("a step of sqrt(16)")
    none, more = (read_overlay(place / f"m/a_diagnosis+{alpha}.nii.gz", place / "a.nii.gz") for alpha in (0, 2))
    np.testing.assert_array_equal(none, nib.load(place / "a.nii.gz").get_fdata())
    assert np.abs(more - none).max() > 1
    twin = reoriented(nib.load(place / "m/twin_diagnosis+2.nii.gz"), "RAS")
    np.testing.assert_allclose(twin.get_fdata(), more, atol=1e-3)


@pytest.fixture
def aged(ldae, place):
    """The run `small` with a calibrated direction of age; 3 units along y_0 are ten years."""
    folder = place / "runs/small/evaluation"
    weights = json.loads((folder / "probes.json").read_text())["weights"]
    zeros, ones, first = np.zeros(16), np.ones(16), np.eye(16)[0]
    readout = LinearModel("age", zeros, ones, 10 / 3 * first, 60.0)
    calibration = Calibration("age", 0.3, deviation=12.0)
    scale = TrainingDistance().scale(calibration, 16)
    directions = {
        "age": Direction(zeros, ones, first, scale, calibration, readout).to_dict(),
        "former": {"mean": zeros.tolist(), "std": ones.tolist(), "unit": first.tolist()},
        "sex": Direction(zeros, ones, first, None, Calibration("sex", 2.0, ("M", "F"))).to_dict(),
    }
    (folder / "directions.json").write_text(json.dumps({"weights": weights, "directions": directions}))
    yield ldae
    (folder / "directions.json").unlink()


def test_an_age_is_moved_by_years(aged, place):
    result = aged("manipulate", "a.nii.gz", "--direction", "age", "--by", "-5,10", "-o", "by", "--viewer")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "alpha = 1: one standard deviation of age in the training scans, 12 years"
    table = [line.split("\t") for line in lines if "\t" in line]
    assert [row[0] for row in table] == ["by", "before", "-5 years", "+10 years"]
    for row, years in zip(table[2:], (-5, 10), strict=True):
        before, after = (float(x) for x in row[1].removeprefix("age ").removesuffix(" years").split(" -> "))
        assert after - before == pytest.approx(years, abs=0.11)
    made = json.loads((place / "by/a_age_by+10.json").read_text())
    assert (made["By"], made["ByUnit"]) == (10, "years")
    assert made["Alpha"] == pytest.approx(10 / 12)
    assert made["AlphaUnit"] == "one standard deviation of age in the training scans, 12 years"
    assert '"-5 years", "+0 years", "+10 years"' in (place / "by/a_age_by.html").read_text()


def test_an_edit_that_cannot_be_counted_is_refused_before_the_scan_is_read(aged):
    def refusal(name, *sizes):
        result = aged("manipulate", "missing.nii.gz", "--direction", name, *sizes, "-o", "refused")
        assert result.exit_code != 0
        return result.output

    assert "give alpha (--alpha), of which 1 is a step of sqrt(16)" in refusal("sex", "--by", "10")
    assert "two classes, M and F" in refusal("sex", "--by", "10")
    assert "without a calibration" in refusal("former", "--by", "10")
    assert "without a calibration" in refusal("diagnosis", "--by", "10")
    assert "give one of them" in refusal("age", "--by", "10", "--alpha", "1")
    assert "--by 'x': give numbers" in refusal("age", "--by", "x")


def test_the_viewer_is_self_contained(ldae, place):
    ldae("manipulate", "a.nii.gz", "--direction", "diagnosis", "-o", "html", "--viewer")
    page = (place / "html/a_diagnosis.html").read_text()
    assert "http" not in page
    assert "{{" not in page
    start = page.index("const data = ") + len("const data = ")
    data = json.loads(page[start : page.index(";\n", start)])
    assert data["labels"] == ["alpha -1", "alpha +0", "alpha +1"]
    assert data["shape"] == [8, 8, 8]


def test_samples_are_images_in_model_space(ldae, place):
    assert ldae("sample", "-n", 2, "--without-prior", "-o", "samples").exit_code == 0
    images = [nib.load(place / f"samples/sample0{n}.nii.gz") for n in (1, 2)]
    assert {image.shape for image in images} == {(8, 8, 8)}
    assert np.abs(images[0].get_fdata() - images[1].get_fdata()).max() > 0


def test_an_exported_bundle_gives_the_same_y_and_has_a_model_card(ldae, place):
    assert ldae("export", "small", "-o", "bundle", model=False).exit_code == 0
    card = (place / "bundle/README.md").read_text()
    for heading in ("## Data", "## Metrics", "## Intended use", "## Limits"):
        assert heading in card
    assert str(place) not in card
    ldae("embed", "a.nii.gz", "-o", "by_run.csv")
    ldae("embed", "a.nii.gz", "-o", "by_bundle.csv", "--bundle", "bundle", model=False)
    assert (place / "by_run.csv").read_text() == (place / "by_bundle.csv").read_text()


def rows(path):
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def test_embed_continues_and_recomputes_a_scan_that_was_replaced(ldae, place):
    nib.save(brain(5), place / "changing.nii.gz")
    assert ldae("embed", "a.nii.gz", "twin.nii.gz", "-o", "y.csv").exit_code == 0
    first = (place / "y.csv").read_text()
    (place / "y.csv").write_text(first + "b.nii.gz,torn")  # killed while writing
    assert ldae("embed", "a.nii.gz", "b.nii.gz", "changing.nii.gz", "-o", "y.csv").exit_code == 0
    assert (place / "y.csv").read_text().startswith(first)  # byte by byte
    table = {row["path"]: row for row in rows(place / "y.csv")}
    assert list(table) == ["a.nii.gz", "twin.nii.gz", "b.nii.gz", "changing.nii.gz"]
    assert [table["a.nii.gz"][f"y{n:03d}"] for n in range(16)] == [table["twin.nii.gz"][f"y{n:03d}"] for n in range(16)]
    nib.save(brain(6), place / "changing.nii.gz")
    assert ldae("embed", "changing.nii.gz", "-o", "y.csv").exit_code == 0
    again = {row["path"]: row for row in rows(place / "y.csv")}
    assert len(again) == 4
    assert again["changing.nii.gz"]["y000"] != table["changing.nii.gz"]["y000"]


def test_embedded_scans_are_not_computed_again(ldae, place, monkeypatch):
    assert ldae("embed", "a.nii.gz", "-o", "once.csv").exit_code == 0
    monkeypatch.setattr(ResumableCsv, "add", lambda *_: pytest.fail("computed again"))
    assert ldae("embed", "a.nii.gz", "-o", "once.csv").exit_code == 0


@pytest.mark.parametrize("order", [("1/2", "2/2"), ("3/3", "1/3", "2/3"), ("7/7", *(f"{n}/7" for n in range(1, 7)))])
def test_shards_in_any_order_embed_the_same_tables_as_one_job(ldae, place, order):
    scans = ("b.nii.gz", "a.nii.gz", "four.nii.gz", "twin.nii.gz")
    assert ldae("embed", *scans, "-o", "whole.csv").exit_code == 1
    folder = place / f"shards{len(order)}"
    folder.mkdir()
    for shard in order:
        assert not (folder / "y.csv").exists()
        status = ldae("embed", *scans, "-o", folder / "y.csv", "--shard", shard).exit_code
    assert status == 1  # that of the last one: a scan was rejected
    for _ in range(2):  # once more by --merge
        assert (folder / "y.csv").read_bytes() == (place / "whole.csv").read_bytes()
        assert (folder / "y_rejected.csv").read_bytes() == (place / "whole_rejected.csv").read_bytes()
        assert ldae("embed", *scans, "-o", folder / "y.csv", "--merge", model=False).exit_code == 1
    assert sorted(path.name for path in folder.iterdir()) == [".y.csv.lock", "y.csv", "y_rejected.csv"]


def test_merge_writes_what_is_embedded_and_names_what_is_not(ldae, place):
    arguments = ("embed", "a.nii.gz", "b.nii.gz", "twin.nii.gz", "-o", "parts.csv")
    result = ldae(*arguments, "--merge", model=False)
    assert result.exit_code == 2
    assert "run the shards first" in result.output
    assert ldae(*arguments, "--shard", "1/2").exit_code == 0
    result = ldae(*arguments, "--merge", model=False)
    assert result.exit_code == 2
    assert "1 of 3 scans are not embedded yet (the first: b.nii.gz)" in result.output
    assert [row["path"] for row in rows(place / "parts.csv")] == ["a.nii.gz", "twin.nii.gz"]
    assert ldae(*arguments, "--shard", "2/2").exit_code == 0
    assert [row["path"] for row in rows(place / "parts.csv")] == ["a.nii.gz", "b.nii.gz", "twin.nii.gz"]


def test_two_jobs_without_shards_do_not_write_one_table(ldae, place):
    with lock_file(place / "busy.csv", ""):
        result = ldae("embed", "a.nii.gz", "-o", "busy.csv")
    assert result.exit_code == 2
    assert "another process writes to busy.csv: give several jobs a --shard" in result.output


def test_rejected_scans_are_tabulated_and_the_others_embedded(ldae, place):
    (place / "lost.nii.gz").symlink_to(".git/annex/objects/x.nii.gz")
    assert "a link to a file that is missing" in ldae("embed", "lost.nii.gz", "-o", "some.csv").output
    result = ldae("embed", "four.nii.gz", "a.nii.gz", "gone.nii.gz", "lost.nii.gz", "head.nii.gz", "-o", "some.csv")
    assert result.exit_code == 1
    assert [row["path"] for row in rows(place / "some.csv")] == ["a.nii.gz"]
    reasons = {row["path"]: row["reason"] for row in rows(place / "some_rejected.csv")}
    assert "not one 3-D volume" in reasons["four.nii.gz"]
    assert reasons["gone.nii.gz"] == "no such file"
    assert "git annex get" in reasons["lost.nii.gz"]
    assert "out-of-distribution check" in reasons["head.nii.gz"]
    assert ldae("embed", "a.nii.gz", "-o", "some.csv").exit_code == 0
    assert not (place / "some_rejected.csv").exists()


def test_force_skips_the_out_of_distribution_check(ldae, place):
    refused = ldae("reconstruct", "head.nii.gz", "-o", "h.nii.gz")
    assert refused.exit_code == 2
    assert not (place / "h.nii.gz").exists()
    assert ldae("reconstruct", "head.nii.gz", "-o", "h.nii.gz", "--force").exit_code == 0
    read_overlay(place / "h.nii.gz", place / "head.nii.gz")


MISTAKES = [
    (["reconstruct", "gone.nii.gz", "-o", "x.nii.gz"], "gone.nii.gz: no such file"),
    (["reconstruct", "four.nii.gz", "-o", "x.nii.gz"], "not one 3-D volume: shape [4, 4, 4, 3]"),
    (["reconstruct", "text.nii.gz", "-o", "x.nii.gz"], "text.nii.gz: unreadable"),
    (["reconstruct", "a.nii.gz", "-o", "x.png"], "give a name that ends in .nii.gz or .nii"),
    (["reconstruct", "a.nii.gz", "-o", "a.nii.gz"], "is the scan itself"),
    (["reconstruct", "a.nii.gz", "-o", "text.nii.gz/x.nii.gz"], "nothing can be written there (a file is in the way)"),
    (["reconstruct", "-o", "x.nii.gz"], "0 scans were given where one scan is needed"),
    (["vary", "a.nii.gz", "-o", "b.nii.gz"], "give the name of a folder"),
    (["vary", "a.nii.gz", "-o", "text.nii.gz/x"], "nothing can be written there (a file is in the way)"),
    (["sample", "-o", "/dev/null/x"], "nothing can be written there (a file is in the way)"),
    (["embed", "a.nii.gz", "-o", "text.nii.gz/y.csv"], "there (a file is in the way)"),
    (
        ["manipulate", "a.nii.gz", "--direction", "diagnosis", "--alpha", "nan", "-o", "x"],
        "separated by commas",
    ),
    (["interpolate", "a.nii.gz", "-o", "x"], "1 scans were given where two scans are needed"),
    (["interpolate", "a.nii.gz", "b.nii.gz", "--at", "0.5,2", "-o", "x"], "positions must be between 0"),
    (["manipulate", "a.nii.gz", "--direction", "sex", "-o", "x"], "no probe or direction 'sex'; it has diagnosis"),
    (
        ["manipulate", "a.nii.gz", "--direction", "diagnosis", "--alpha", "1;2", "-o", "x"],
        "separated by commas",
    ),
    (["embed", "gone.nii.gz", "-o", "x.csv"], "none of the 1 scans could be embedded"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_ends_in_one_line_and_no_traceback(ldae, arguments, message):
    result = ldae(*arguments)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("ldae: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.output


def test_a_missing_or_ambiguous_model_is_refused(ldae, place):
    scan = ("reconstruct", "a.nii.gz", "-o", "x.nii.gz")
    cases = {
        (): "name one model",
        ("--run", "small", "--bundle", "b"): "name one model",
        ("--run", "gone"): "no run or bundle 'gone'; the runs in runs are: small",
        ("--bundle", "runs/small"): "no bundle",
        ("--run", "small", "--device", "cuda:99"): "--device cuda:99",
    }
    for named, message in cases.items():
        result = ldae(*scan, *named, model=False)
        assert result.exit_code == 2
        assert message in result.stderr


def test_a_bundle_of_another_version_is_refused(ldae, place):
    ldae("export", "small", "-o", "other", model=False)
    path = place / "other/bundle.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    result = ldae("embed", "a.nii.gz", "-o", "x.csv", "--bundle", "other", model=False)
    assert result.exit_code == 2
    assert "format 99, this version of ldae reads 1" in result.stderr


def test_a_table_of_something_else_is_not_overwritten(ldae, place):
    (place / "mine.csv").write_text("subject,age\n1,70\n")
    result = ldae("embed", "a.nii.gz", "-o", "mine.csv")
    assert result.exit_code == 2
    assert (place / "mine.csv").read_text() == "subject,age\n1,70\n"


def test_numbers_are_parsed_or_refused_with_an_example():
    assert parse_numbers("-2,-1,1", "--alpha", "") == [-2, -1, 1]
    with pytest.raises(UserError, match="as in -1,1"):
        parse_numbers("a", "--alpha", "-1,1")


def test_a_process_exits_with_status_2_and_one_line(place):
    command = [sys.executable, "-m", "ldae.cli", "reconstruct", "gone.nii.gz", "-o", "x.nii.gz", "--run", "small"]
    result = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1] == "ldae: gone.nii.gz: no such file"


def test_results_of_another_scan_of_the_same_name_are_not_overwritten(ldae, place):
    for folder, scan in (("first", "a"), ("second", "b")):
        (place / folder).mkdir()
        shutil.copy(place / f"{scan}.nii.gz", place / folder / "T1w.nii.gz")
    commands = (
        ("vary", ["T1w.nii.gz"], ["-n", 1, "-o", "named"]),
        ("manipulate", ["T1w.nii.gz"], ["--direction", "diagnosis", "--alpha", "1", "-o", "named"]),
        ("interpolate", ["T1w.nii.gz", "T1w.nii.gz"], ["--at", "0.5", "-o", "named"]),
        ("reconstruct", ["T1w.nii.gz"], ["-o", "named/T1w_again.nii.gz"]),
    )
    for command, scans, options in commands:
        assert ldae(command, *(f"first/{scan}" for scan in scans), *options).exit_code == 0
        written = {path: path.read_bytes() for path in (place / "named").iterdir()}
        other = ldae(command, *(f"second/{scan}" for scan in scans), *options)
        assert other.exit_code == 2
        assert "was made of another scan" in other.stderr
        assert written == {path: path.read_bytes() for path in (place / "named").iterdir()}
        assert ldae(command, *(f"first/{scan}" for scan in scans), *options).exit_code == 0  # the same again


def test_an_image_that_is_no_result_is_not_overwritten(ldae, place):
    content = (place / "b.nii.gz").read_bytes()
    result = ldae("reconstruct", "a.nii.gz", "-o", "b.nii.gz")
    assert result.exit_code == 2
    assert "was not made by this command" in result.stderr
    assert (place / "b.nii.gz").read_bytes() == content


def test_names_in_the_header_do_not_go_into_results(ldae, place):
    """Descriptive fields and extensions often name the patient."""
    image = nib.load(place / "a.nii.gz")
    image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
    for field in ("descrip", "aux_file", "db_name", "intent_name"):
        image.header[field] = b"DOE^JANE"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    nib.save(image, place / "doe.nii.gz")
    assert b"DOE^JANE" in gzip.decompress((place / "doe.nii.gz").read_bytes())
    options = ("doe.nii.gz", "--direction", "diagnosis", "-o", "header", "--alpha", "1")
    assert ldae("manipulate", *options).exit_code == 0
    assert ldae("reconstruct", "doe.nii.gz", "-o", "header/r.nii.gz").exit_code == 0
    for path in (place / "header").glob("*.nii.gz"):
        assert b"DOE" not in gzip.decompress(path.read_bytes())
        read_overlay(path, place / "a.nii.gz")


def test_an_analyze_file_needs_its_orientation(ldae, place):
    image = nib.load(place / "a.nii.gz")
    nib.save(nib.AnalyzeImage(np.asarray(image.dataobj, dtype=np.int16), image.affine), place / "old.img")
    refused = ldae("embed", "old.img", "-o", "old.csv")
    assert refused.exit_code == 2
    assert "--orientation RAS or LAS" in refused.stderr
    assert ldae("embed", "old.img", "a.nii.gz", "-o", "old.csv", "--orientation", "RAS").exit_code == 0
    old, same = rows(place / "old.csv")
    assert [old[f"y{n:03d}"] for n in range(8)] == [same[f"y{n:03d}"] for n in range(8)]
