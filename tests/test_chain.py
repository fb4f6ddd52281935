"""Runs the whole chain through the scripts: files, resuming, refusals, a sweep, and the tutorial on its results."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file

from faults.scripts import ROOT, run_script
from ldae.commands.cohort import is_finished
from ldae.runs import Workspace
from small_cohort import SMALL, WITHOUT_ANTS, dataset, run

STAGES = ("aekl", "pretrain", "repr")
NOTEBOOK = ROOT / "notebooks" / "tutorial.ipynb"


@pytest.fixture
def copied(smoke, tmp_path):
    """A copy of the smoke run that a test may change. The states are hard links: they are replaced, never edited."""

    def copy(source, target):
        is_state = Path(source).match("state/*.safetensors")
        return os.link(source, target) if is_state else shutil.copy2(source, target)

    shutil.copytree(smoke, tmp_path, dirs_exist_ok=True, copy_function=copy)
    return tmp_path


def latents_of(folder):
    return load_numpy(folder / "runs/smoke/latents/latents.safetensors")


def test_every_stage_writes_its_files(smoke):
    for stage in STAGES:
        run = smoke / "runs/smoke" / stage
        for name in ("config.yaml", "metrics.jsonl", "weights/metadata.json", "tensorboard", "rejected.csv"):
            assert (run / name).exists(), f"{stage}/{name}"
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(steps)
    hashes = {json.loads((smoke / f"runs/smoke/{s}/weights/metadata.json").read_text())["split_hash"] for s in STAGES}
    assert len(hashes) == 1


def test_two_jobs_at_once_encode_what_one_encodes(smoke, copied):
    folder = copied / "runs/smoke/latents"
    shutil.rmtree(folder)
    arguments = (("--shard", "1/2"), ("shard=0/2",))  # as an option and as an override, counted from 1 and from 0
    with ThreadPoolExecutor() as jobs:
        list(jobs.map(lambda shard: run_script("encode_latents", "experiment=smoke", *shard, cwd=copied), arguments))
    for path in (smoke / "runs/smoke/latents").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(("script", "stage"), [("train", "stage=aekl"), ("evaluate", "stage=repr")])
def test_other_scripts_take_no_shard(smoke, script, stage):
    result = run_script(script, "experiment=smoke", stage, "--shard", "1/2", cwd=smoke, check=False)
    assert result.returncode == 2
    assert "only encode_latents.py takes a shard" in result.stderr


def test_latents_have_unit_variance_on_the_training_split(smoke):
    folder = smoke / "runs/smoke/latents"
    about = json.loads((folder / "latents.json").read_text())
    table = pd.read_csv(folder / about["table"])
    # The rows of the table are those of the file.
    (name,) = set(table["latent_path"])
    latents = load_numpy(folder / name)
    train = np.flatnonzero(table["split"] == "train")
    mean, std = latents["mean"][train], latents["std"][train]
    assert mean.dtype == std.dtype == np.float32
    noise = np.random.default_rng(0).standard_normal(mean.shape)
    z = (mean + std * noise) * np.array(about["scale"])[:, None, None, None]
    np.testing.assert_allclose(z.std(axis=(0, 2, 3, 4)), 1, atol=0.1)


def test_stage_3_publishes_no_part_of_the_frozen_u_net(smoke):
    """It publishes encoder and estimator, and its metadata name the U-Net of stage 2."""
    metadata = json.loads((smoke / "runs/smoke/repr/weights/metadata.json").read_text())
    assert set(metadata["weights"]) == {"encoder", "estimator"}
    stage2 = json.loads((smoke / "runs/smoke/pretrain/weights/metadata.json").read_text())
    assert metadata["stands_on"]["pretrain"] == stage2["weights"]


def test_a_finished_stage_is_not_trained_again(copied):
    before = (copied / "runs/smoke/pretrain/weights/unet.safetensors").read_bytes()
    result = run_script("train", "experiment=smoke", "stage=pretrain", cwd=copied)
    assert "resuming pretrain at step 4 of 4" in result.stderr
    assert (copied / "runs/smoke/pretrain/weights/unet.safetensors").read_bytes() == before


@pytest.mark.parametrize("stage", STAGES)
def test_two_and_two_steps_equal_four_to_the_bit(copied, stage):
    """A run that is resumed at step 2 ends with the weights of the run that was not interrupted."""
    run = copied / "runs/smoke" / stage
    whole = {p.name: load_file(p) for p in (run / "state").glob("*.safetensors")}["step_00000004.safetensors"]
    for path in (run / "state").glob("step_00000004.*"):
        path.unlink()
    result = run_script("train", "experiment=smoke", f"stage={stage}", cwd=copied)
    assert f"resuming {stage} at step 2 of 4" in result.stderr
    resumed = load_file(run / "state/step_00000004.safetensors")
    assert resumed.keys() == whole.keys()
    different = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert not different


@pytest.mark.parametrize(
    ("stage", "start"), [("pretrain", "pretrain/weights/unet.safetensors"), ("repr", "repr/weights")]
)
def test_a_stage_starts_from_given_weights(copied, stage, start):
    """With a learning rate of 0, the published weights are those that training started from."""
    shutil.copytree(copied / "runs/smoke" / stage, copied / "earlier" / stage)
    shutil.rmtree(copied / "runs/smoke" / stage)
    start = copied / "earlier" / start
    rate = ("optim.lr=0", "trainer.ema=null")
    run_script("train", "experiment=smoke", f"stage={stage}", f"stage.initial_weights={start}", *rate, cwd=copied)
    for path in (copied / "earlier" / stage / "weights").glob("*.safetensors"):
        published, given = load_file(copied / "runs/smoke" / stage / "weights" / path.name), load_file(path)
        assert all(torch.equal(published[name], given[name]) for name in given), path.name
    shutil.rmtree(copied / "runs/smoke" / stage)
    arguments = ("experiment=smoke", f"stage={stage}", f"stage.initial_weights={copied}/nowhere")
    refused = run_script("train", *arguments, cwd=copied, check=False)
    assert refused.returncode != 0
    assert "nowhere" in refused.stderr.splitlines()[-1]


def test_encoding_keeps_intact_latents_and_replaces_damaged_ones(copied):
    path = copied / "runs/smoke/latents/latents.safetensors"
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[len(good) // 2] ^= 255
    path.write_bytes(damaged)
    result = run_script("encode_latents", "experiment=smoke", cwd=copied)
    assert "are encoded already" in result.stderr
    assert path.read_bytes() == good


def test_stage_2_needs_the_latents_and_no_scan(copied):
    """On a machine that has only the latents it publishes the same weights, and makes no cache of volumes."""
    trained = load_file(copied / "runs/smoke/pretrain/weights/unet.safetensors")
    for name in ("data", "runs/smoke/aekl", "runs/smoke/pretrain", "runs/smoke/repr"):
        shutil.rmtree(copied / name)
    (copied / "runs/smoke/split.csv").unlink()
    arguments = ("experiment=smoke", "stage=pretrain", "data=table", "data.table=scans.csv")
    run_script("train", *arguments, "data.shape=[24,24,24]", "data.spacing=9.0", cwd=copied)
    found = load_file(copied / "runs/smoke/pretrain/weights/unet.safetensors")
    assert all(torch.equal(found[name], trained[name]) for name in trained)
    assert not (copied / "data").exists()


def test_a_latent_of_another_autoencoder_is_refused(copied):
    run_script("train", "experiment=smoke", "stage=aekl", "trainer.max_steps=6", cwd=copied)
    result = run_script("train", "experiment=smoke", "stage=pretrain", cwd=copied, check=False)
    assert result.returncode == 2
    assert "another autoencoder" in result.stderr
    assert "Traceback" not in result.stderr


def test_another_split_is_refused(copied):
    path = copied / "runs/smoke/split.csv"
    split = pd.read_csv(path, dtype=str)
    split["split"] = split["split"].to_numpy()[::-1]
    split.to_csv(path, index=False)
    result = run_script("train", "experiment=smoke", "stage=pretrain", cwd=copied, check=False)
    assert result.returncode == 2
    assert "split" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_jobs_of_a_sweep_have_folders_of_their_own(copied):
    run_script("train", "-m", "experiment=smoke", "stage=pretrain", "optim.lr=0.001,0.002", cwd=copied)
    runs = sorted(p.name for p in (copied / "runs/smoke").glob("pretrain@*"))
    assert len(runs) == 2
    first, second = (load_file(copied / "runs/smoke" / r / "weights/unet.safetensors") for r in runs)
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_metrics_and_report_are_written(smoke):
    folder = smoke / "runs/smoke/evaluation"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert all(isinstance(value, (int, float)) for value in metrics.values())
    assert "reconstruction/autoencoder/ssim_mask" in metrics
    assert any(name.startswith("semantics/z0_error/own") for name in metrics)
    assert (folder / "report.html").exists()


def cells(kind):
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_the_tutorial_runs_from_top_to_bottom(smoke, tmp_path):
    """Its code cells, in order, in one fresh process, as a kernel would run them."""
    code = "\n\n".join("".join(cell["source"]) for cell in cells("code"))
    (tmp_path / "tutorial.py").write_text(code, encoding="utf-8")
    environment = {"LDAE_RUN": "smoke", "CUDA_VISIBLE_DEVICES": ""}
    result = run_script(tmp_path / "tutorial.py", cwd=smoke, environment=environment)
    for said in ("probes ['age', 'diagnosis']", "alpha 0 ['AD"):
        assert said in result.stdout


def test_the_tutorial_holds_no_output():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_the_untrained_baseline_starts_where_the_training_started(copied):
    """With a learning rate of 0, the published encoder is the one that training started from: draw 0 of its weights."""
    from ldae.evaluation.initial_encoder import build_initial_encoder
    from ldae.runs import Run

    run = Run(copied / "runs/smoke/repr")
    shutil.rmtree(run.path)
    run_script("train", "experiment=smoke", "stage=repr", "optim.lr=0", "trainer.ema=null", cwd=copied)
    trained = run.module("encoder", run.config.model.encoder)
    for draw in (0, 1):
        start = build_initial_encoder(run, draw, trained).state_dict()
        different = [name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, start[name])]
        assert bool(different) == bool(draw)


def test_raw_scans_become_metrics_and_the_same_command_does_nothing_twice(smoke, tmp_path):
    shutil.copytree(smoke / "runs", tmp_path / "runs")
    dataset(tmp_path / "raw")
    command = ("raw", "--name", "mine", *WITHOUT_ANTS, *SMALL)
    result = run(tmp_path, *command)
    assert result.exit_code == 0, result.output + str(result.exception)
    path = tmp_path / "runs/mine/evaluation/metrics.json"
    metrics = json.loads(path.read_text())
    assert {"cv/transductive/probe/age/mae", "cv/transductive/probe/sex/auc"} <= metrics.keys()
    config = (tmp_path / "runs/mine/aekl/config.yaml").read_text()
    assert "initial_weights: runs/smoke/aekl/weights/autoencoder.safetensors" in config
    assert all(is_finished(Workspace(tmp_path / "runs/mine"), stage) for stage in ("aekl", "pretrain", "repr"))
    watched = [
        path,
        *(tmp_path / "derivatives/mine").rglob("*.nii.gz"),
        tmp_path / "runs/mine/latents/latents.safetensors",
    ]
    before = {file: file.stat().st_mtime_ns for file in watched}
    assert run(tmp_path, *command).exit_code == 0
    assert {file: file.stat().st_mtime_ns for file in watched} == before
