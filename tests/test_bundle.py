"""Proves that a run and its bundle are the same model, that stages of different runs are not combined, and that every
kind of damaged or malicious bundle is refused."""

import json
import shutil

import pytest
import torch
from omegaconf import OmegaConf

from ldae import LDAE
from ldae.bundle.allowlist import refuse_untrusted_targets
from ldae.utils.errors import UserError

X = torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    return model.export(tmp_path_factory.mktemp("bundle") / "b")


def test_a_bundle_is_the_same_model_as_its_run(model, bundle, tmp_path):
    moved = shutil.copytree(bundle, tmp_path / "moved")
    other = LDAE.load(moved, device="cpu")
    assert torch.equal(
        other.decode(other.noise(1), other.embed(X[:1])), model.decode(model.noise(1), model.embed(X[:1]))
    )
    assert other.probes["diagnosis"].to_dict() == model.probes["diagnosis"].to_dict()
    assert other.transform.key() == model.transform.key()
    assert other.sampler == model.sampler
    again = other.export(tmp_path / "again")
    assert (again / "bundle.json").read_text() == (bundle / "bundle.json").read_text()


def test_the_description_has_the_keys_of_format_1(bundle):
    assert set(json.loads((bundle / "bundle.json").read_text())) == {
        "format", "modules", "scale", "transform", "schedule", "parameterisation", "sampler", "probes", "directions",
        "likeness", "preprocess", "affine", "sources",
    }  # fmt: skip


def change_encoder(description, folder):
    description["modules"]["encoder"]["config"]["backbone"]["_target_"] = "ldae.models.convnext.Path"


def change_unet(**arguments):
    return lambda description, folder: description["modules"]["unet"]["config"].update(**arguments)


def point_outside(description, folder):
    shutil.copyfile(folder / "unet.safetensors", folder.parent / "unet.safetensors")
    description["modules"]["unet"]["file"] = "../unet.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda description, folder: description.update(format=2), "format 2, this version of ldae reads 1"),
        (lambda description, folder: description.pop("scale"), "'scale' is missing"),
        (lambda description, folder: description["modules"].pop("unet"), "'unet' is missing"),
        (lambda description, folder: description["modules"].update(unet=3), "a value is of the wrong kind"),
        (lambda description, folder: description.update(scale=[0.0]), "a value is of the wrong kind"),
        (lambda description, folder: description.update(sources="x" * 2**20), "is damaged"),
        (lambda description, folder: (folder / "unet.safetensors").unlink(), "'unet.safetensors' is missing"),
        (
            lambda description, folder: (folder / "unet.safetensors").write_bytes(b"x"),
            "not the file that was described",
        ),
        (lambda description, folder: (folder / "probes.json").write_text("{}"), "not the file that was described"),
        (point_outside, "is outside the bundle's folder"),
        (change_unet(base=16), "tensor 'time.0.weight' is"),
        (change_unet(base=10**6), "could ask for any amount of memory"),
        (change_unet(residual_blocks=4000), "asks for .* blocks"),
        (change_unet(multipliers=[1] * 900), "asks for .* blocks"),
        (change_unet(multipliers=[1] * 20_000), "a list of 20000 is not allowed"),
        (change_unet(_target_="os.system"), "may not be built"),
        (change_unet(_partial_=True), "'_partial_' is not allowed"),
        (
            lambda description, folder: description["sampler"].update(_target_="ldae.utils.files.write_text"),
            "may not be built",
        ),
        (
            lambda description, folder: description["transform"].update(_target_="ldae.data.transforms.load_scan"),
            "is not an allowed target in a bundle",
        ),
        (change_encoder, "is not an allowed target in a bundle"),
    ],
)
def test_an_altered_bundle_is_refused(bundle, tmp_path, change, message):
    folder = shutil.copytree(bundle, tmp_path / "altered")
    description = json.loads((folder / "bundle.json").read_text())
    change(description, folder)
    (folder / "bundle.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=message):
        LDAE.load(folder, device="cpu")


def test_configs_may_not_read_the_environment():
    with pytest.raises(UserError, match="not allowed"):
        refuse_untrusted_targets({"a": ["${oc.env:HOME}"]}, "x")


def test_a_module_may_be_built_if_the_user_trusts_it():
    config = {"_target_": "fractions.Fraction"}
    with pytest.raises(UserError, match="trust its module"):
        refuse_untrusted_targets(config, "x")
    refuse_untrusted_targets(config, "x", allowed=("fractions.",))


def test_stages_that_do_not_belong_together_are_refused(run, tmp_path):
    root = shutil.copytree(run, tmp_path / "spoilt")
    path = root / "aekl/weights/metadata.json"
    metadata = json.loads(path.read_text())
    metadata["weights"]["autoencoder"]["sha256"] = "0"
    path.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match="another autoencoder"):
        LDAE.load(root)
    with pytest.raises(UserError, match="no trained 'aekl'"):
        LDAE.load(tmp_path)
    with pytest.raises(UserError, match=r"no run or bundle 'gone'; the runs in .* are: spoilt"):
        LDAE.load("gone", runs=tmp_path)


def test_the_file_that_training_started_from_is_not_needed(run, tmp_path):
    root = shutil.copytree(run, tmp_path / "started")
    path = root / "repr/config.yaml"
    config = OmegaConf.load(path)
    config.model.encoder.backbone.weights = "gone.pth"
    OmegaConf.save(config, path)
    assert LDAE.load(root, device="cpu").embed(X).shape == (2, 16)
