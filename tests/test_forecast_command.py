"""Proves that `ldae forecast` works from runs and bundles, on any orientation, and that mistakes end in one line."""

import shutil

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from ldae.bundle.bundle import Bundle
from ldae.cli import main
from ldae.editing.forecast_file import write_forecaster
from small_forecaster import a_forecaster
from small_scans import brain, reoriented

GIVEN = ("--age", "70", "--column", "diagnosis=AD", "--draws", "2")


@pytest.fixture(scope="module")
def place(run, tmp_path_factory):
    """A folder with a run that has a forecast, one that has none, a bundle of the former, and scans."""
    folder = tmp_path_factory.mktemp("user")
    shutil.copytree(run, folder / "runs/small")
    shutil.copytree(run, folder / "runs/none")
    weights = Bundle.from_run(folder / "runs/small").weights_hash
    write_forecaster(folder / "runs/small/evaluation/forecast.safetensors", a_forecaster(), weights)
    Bundle.from_run(folder / "runs/small").save(folder / "bundle")
    nib.save(brain(0), folder / "a.nii.gz")
    nib.save(reoriented(brain(0), "PSR"), folder / "twin.nii.gz")
    return folder


@pytest.fixture
def forecast(place, monkeypatch):
    """A function that runs `ldae forecast` in `place`."""
    monkeypatch.chdir(place)

    def run(*arguments, model=("--run", "small")):
        return CliRunner().invoke(main, ["forecast", *arguments, *model, "--device", "cpu"])

    return run


def test_images_and_maps_overlay_on_the_scan_in_any_orientation(forecast, place):
    for scan in ("a", "twin"):
        result = forecast(f"{scan}.nii.gz", "--years", "1,2", *GIVEN, "-o", "out")
        assert result.exit_code == 0, result.output
    original = nib.load(place / "a.nii.gz").get_fdata()
    images = {name: nib.load(place / f"out/a_in+{name}.nii.gz") for name in ("1years", "2years", "2years_deviation")}
    for image in images.values():
        np.testing.assert_array_equal(image.affine, nib.load(place / "a.nii.gz").affine)
    change = {name: image.get_fdata() - original for name, image in images.items() if "deviation" not in name}
    assert np.abs(change["1years"]).max() > 1
    assert np.linalg.norm(change["2years"]) > np.linalg.norm(change["1years"])
    deviation = images["2years_deviation"].get_fdata()
    assert deviation.min() >= 0
    assert deviation.max() > 1
    twin = nib.load(place / "out/twin_in+2years.nii.gz")
    np.testing.assert_allclose(reoriented(twin, "RAS").get_fdata(), images["2years"].get_fdata(), atol=0.5)
    lines = [line for line in result.stdout.splitlines() if "\t" in line]
    assert lines[1].startswith("2 years\tventricle +21.0 % [+")


def test_a_bundle_forecasts_as_its_run_does(forecast, place):
    for name, model in (("r", ("--run", "small")), ("b", ("--bundle", "bundle"))):
        result = forecast("a.nii.gz", "--years", "2", *GIVEN, "-o", name, model=model)
        assert result.exit_code == 0, result.output
    for file in ("a_in+2years.nii.gz", "a_in+2years_deviation.nii.gz"):
        np.testing.assert_array_equal(*(nib.load(place / folder / file).get_fdata() for folder in "rb"))


def test_the_diagnosis_matters_and_years_far_ahead_are_warned_of(forecast, place, caplog):
    for diagnosis in ("AD", "CN"):
        known = ("--age", "70", "--column", f"diagnosis={diagnosis}", "--draws", "0")
        assert forecast("a.nii.gz", "--years", "5", *known, "-o", diagnosis).exit_code == 0
    assert "5 years is far beyond the visits that this forecast was learned from" in caplog.text
    original = nib.load(place / "a.nii.gz").get_fdata()
    ill, well = (
        np.linalg.norm(nib.load(place / f"{n}/a_in+5years.nii.gz").get_fdata() - original) for n in ("AD", "CN")
    )
    assert ill > well
    assert not (place / "AD/a_in+5years_deviation.nii.gz").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--years", "-1", *GIVEN), "-1 is no time ahead: give positive numbers"),
        (("--years", "one", *GIVEN), "give numbers separated by commas"),
        ((), "depends on the age at the scan: give it (--age YEARS)"),
        (("--age", "70", "--column", "diagnosis"), "give NAME=VALUE, as in diagnosis=AD"),
        (("--age", "70", "--column", "diagnosis=XX"), "diagnosis=XX: this model knows AD, CN"),
        (("--age", "70", "--column", "sex=F"), "does not read that column; it reads age, diagnosis"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_writes_nothing(forecast, place, arguments, said):
    result = forecast("a.nii.gz", *arguments, "-o", "wrong")
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (place / "wrong").exists()


def test_a_model_without_a_forecast_says_what_to_do(forecast):
    result = forecast("a.nii.gz", "--age", "70", "-o", "wrong", model=("--run", "none"))
    assert result.exit_code == 2
    assert "this model has no forecast: run `python evaluate.py evaluation=[forecast] name=NAME`" in result.stderr
