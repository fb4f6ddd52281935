"""Voxel space: with `model/autoencoder=identity` stage 1 ends at once, a run embeds, reconstructs and exports like any
other, and the seconds of both spaces are reported."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from faults.scripts import run_script
from ldae import LDAE
from ldae.bundle.bundle import Bundle
from ldae.evaluation.seconds import Seconds
from ldae.runs import Run
from small_run import SMALL, small_run

VOXELS = [*[text for text in SMALL if "model.autoencoder" not in text], "model/autoencoder=identity",
          "~model.autoencoder.channels", "~model.autoencoder.groups"]  # fmt: skip


@pytest.fixture(scope="module")
def voxels(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("runs") / "voxels", settings=VOXELS)


@pytest.fixture(scope="module")
def x():
    return torch.rand(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_latent_is_the_scaled_scan_and_no_tensor_is_stored_for_it(voxels, x):
    model = LDAE.load(voxels, device="cpu")
    torch.testing.assert_close(model.compress(x), 1.5 * x)
    torch.testing.assert_close(model.decompress(model.compress(x)), x)
    assert load_file(voxels / "aekl/weights/autoencoder.safetensors") == {}
    y = model.embed(x)
    assert model.decode(model.invert(model.compress(x), y), y).shape == x.shape


def test_an_exported_bundle_computes_the_same(voxels, x, tmp_path):
    Bundle.from_run(voxels).save(tmp_path / "bundle")
    model, bundle = LDAE.load(voxels, device="cpu"), LDAE.load(tmp_path / "bundle", device="cpu")
    y = model.embed(x)
    assert torch.equal(bundle.embed(x), y)
    code = model.invert(model.compress(x), y)
    assert torch.equal(bundle.decode(code, y), model.decode(code, y))


def context_of(run, x):
    """What Seconds reads of a context: two test scans."""
    skipped = []
    return SimpleNamespace(
        model=LDAE.load(run, device="cpu"), sample_rows=lambda split, count: [0, 1], skip=skipped.append,
        volumes=lambda rows: x[rows], views=lambda rows: x[rows], skipped=skipped,
    )  # fmt: skip


def test_seconds_are_those_of_the_runs_and_of_a_scan(voxels, x, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(voxels, root)
    context = context_of(root, x)
    unknown = dict(Seconds(root)(context))
    assert unknown.keys() == {f"seconds/{name}{end}" for name in ("embed", "reconstruct") for end in ("", "_cpu")}
    assert len(context.skipped) == 3
    metadata = root / "aekl/weights/metadata.json"
    metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "step": 0}))  # nothing to train
    for stage, seconds in (("pretrain", 30.5), ("repr", 12.0)):
        (root / stage / "progress.json").write_text(json.dumps({"step": 4, "seconds": seconds, "finished": True}))
    found = dict(Seconds(root)(context))
    assert found["seconds/train/aekl"] == 0
    assert found["seconds/train/total"] == 42.5
    assert found["seconds/reconstruct"] > 0 < found["seconds/embed"]


def test_stage_1_without_anything_to_train_ends_at_once_and_leaves_a_trained_one_alone(smoke, tmp_path):
    (tmp_path / "data").symlink_to(smoke / "data")
    identity = ["experiment=smoke", "stage=aekl", "model/autoencoder=identity", "~model.autoencoder.channels",
                "~model.autoencoder.groups"]  # fmt: skip
    for _ in range(2):
        run_script("train", *identity, "name=voxels", cwd=tmp_path)
    run = Run(tmp_path / "runs/voxels/aekl")
    assert run.metadata["step"] == 0
    assert run.config.model.autoencoder["_target_"].endswith("IdentityAutoencoder")
    assert (tmp_path / "runs/voxels/split.csv").read_text() == (smoke / "runs/smoke/split.csv").read_text()
    shutil.copytree(smoke / "runs/smoke/aekl", tmp_path / "runs/smoke/aekl")
    refused = run_script("train", *identity, "name=smoke", "trainer.accept_changes=true", cwd=tmp_path, check=False)
    assert refused.returncode == 2
    assert "is the run of a trained autoencoder" in refused.stderr
