"""The supervised twin learns from labels of the training split alone, keeps the best validation, resumes to the bit and
trains what stage 3 freezes; its own predictions stand beside the probes, of this split only, or are said to lack."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from scipy.special import expit

from faults.scripts import run_script
from ldae.config import Optim, TrainerSettings
from ldae.evaluation.context import Context
from ldae.evaluation.probes.cross_validation import CrossValidation
from ldae.evaluation.probes.evaluator import Probes
from ldae.evaluation.probes.targets import Classification, Regression
from ldae.evaluation.supervised import SupervisedTwins
from ldae.models.components_encoder import ComponentsEncoder
from ldae.models.supervised_network import SupervisedNetwork
from ldae.models.volume_cnn import VolumeCNN
from ldae.runs import Run, Workspace
from ldae.stages.supervised import SupervisedStage
from ldae.stages.tasks import ClassTask, NumberTask
from ldae.training.trainer import Trainer
from ldae.utils.errors import UserError
from ldae.utils.seeding import make_generator
from small_stages import MadeUpCohort

SHAPE = (1, 8, 8, 8)
ENCODER = {"_target_": "ldae.models.components_encoder.ComponentsEncoder", "shape": list(SHAPE), "components": 3,
           "dim": 16}  # fmt: skip
DIAGNOSIS = Classification("diagnosis", "AD", "CN")


class LabelledCohort(MadeUpCohort):
    """36 scans of as many subjects, 16 for training, 10 for validation, 10 for testing. The mean of a scan tells."""

    transform = SimpleNamespace(key=lambda: "t")
    view_key = None

    def __init__(self):
        level = torch.linspace(0, 1, 36)[torch.randperm(36, generator=make_generator(0, "order"))]
        noise = torch.rand(36, *SHAPE, generator=make_generator(0, "noise"))
        self.x = 0.7 * level.view(-1, 1, 1, 1, 1) + 0.3 * noise
        take = lambda rows: self.x[torch.as_tensor(np.array(rows))]  # noqa: E731
        self.volumes = SimpleNamespace(batch=take, read_stored=take, decode=lambda x: x, shape=SHAPE[1:])
        self.views = self.volumes
        self.table = pd.DataFrame(
            {
                "subject": [f"s{n:02d}" for n in range(36)], "session": "ses-M000", "months": 0, "path": "x.nii.gz",
                "diagnosis": np.where(level > 0.5, "AD", "CN"), "age": 50 + 40 * level.numpy(),
                "split": ["train"] * 16 + ["val"] * 10 + ["test"] * 10,
            }
        )  # fmt: skip

    def __len__(self):
        return len(self.table)

    def digest_views(self):
        return np.zeros((len(self), 16), np.uint8)


def stage_of(task, folder, cohort=None, weights=None, encoder=None):
    torch.manual_seed(0)
    encoder = encoder or ComponentsEncoder(SHAPE, 3, 16)
    return SupervisedStage(encoder, task, weights, cohort or LabelledCohort(), Workspace(folder))


def diagnosis(**options):
    return ClassTask("diagnosis", "diagnosis", "AD", "CN", **options)


def fit(stage, folder, steps=4, **settings):
    """Train a stage as train.py does; returns its run."""
    run = Run(folder / "supervised" / stage.task.name)
    given = {"max_steps": steps, "batch_size": 4, "ema": 0.5, "validate_every": 2, "checkpoint_every": 2, **settings}
    trainer = Trainer(Accelerator(cpu=True), run, TrainerSettings(**given), Optim(lr=1e-2, encoder_lr=1e-3), seed=0)
    data = {"split_hash": stage.cohort.split_hash, "transform": "t"}
    config = {"model": {}, "stage": {"encoder": ENCODER}}
    trainer.fit(stage, data, lambda: run.write_config(OmegaConf.create(config)))
    return run


def published(run):
    return load_file(run.weights / "network.safetensors")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_no_label_and_no_scan_outside_of_train_reaches_the_weights_or_the_scale(tmp_path):
    plain, poisoned = LabelledCohort(), LabelledCohort()
    poisoned.table.loc[16:, "age"] = 1e6 + np.arange(20)
    poisoned.x[16:] = 7.0
    for name, cohort in (("plain", plain), ("poisoned", poisoned)):
        run = fit(stage_of(NumberTask("age", "age"), tmp_path / name, cohort), tmp_path / name, validate_every=None)
        assert float(published(run)["mean"]) == pytest.approx(plain.table["age"][:16].mean())
    first, second = (published(Run(tmp_path / name / "supervised/age")) for name in ("plain", "poisoned"))
    assert same(first, second)


def test_the_test_split_has_no_part_in_what_is_kept(tmp_path):
    cohort = LabelledCohort()
    before = fit(stage_of(diagnosis(), tmp_path / "a", cohort), tmp_path / "a")
    cohort.table.loc[26:, "diagnosis"] = "CN"
    cohort.x[26:] = 0
    after = fit(stage_of(diagnosis(), tmp_path / "b", cohort), tmp_path / "b")
    assert same(published(before), published(after))
    assert before.metadata == after.metadata


def test_two_and_two_steps_equal_four_to_the_bit_and_seconds_and_end_are_recorded(tmp_path):
    once = fit(stage_of(diagnosis(), tmp_path / "once"), tmp_path / "once")
    fit(stage_of(diagnosis(), tmp_path / "twice"), tmp_path / "twice", steps=2)
    seconds = Run(tmp_path / "twice/supervised/diagnosis").progress["seconds"]
    twice = fit(stage_of(diagnosis(), tmp_path / "twice"), tmp_path / "twice")
    assert same(published(once), published(twice))
    assert twice.progress["seconds"] > seconds > 0
    assert (twice.progress["step"], twice.progress["finished"]) == (4, True)


def test_other_labels_are_another_training(tmp_path):
    fit(stage_of(diagnosis(), tmp_path), tmp_path, steps=2)
    cohort = LabelledCohort()
    cohort.table.loc[[0, 1], "diagnosis"] = cohort.table["diagnosis"][[0, 1]].map({"AD": "CN", "CN": "AD"})
    with pytest.raises(UserError, match="with another labels"):
        fit(stage_of(diagnosis(), tmp_path, cohort), tmp_path)


def test_all_of_an_encoder_of_components_is_trained_and_starts_as_the_components(tmp_path):
    plain = ComponentsEncoder(SHAPE, 3, 16)
    stage = stage_of(diagnosis(), tmp_path)
    stage.prepare(Accelerator(cpu=True), TrainerSettings(ema=None), Optim(lr=1e-2), 0)
    network = stage.modules["network"]
    for name in ("mean", "components", "scale"):
        getattr(plain, name).copy_(getattr(network.encoder, name).detach())
    x = stage.cohort.x[:2]
    torch.testing.assert_close(network.encoder(x), plain(x), atol=1e-3, rtol=0)  # 16 bits in stage 3
    assert torch.equal(network(x), torch.zeros(2))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for step in range(2):  # the head is 0 in the first step, and lets no gradient through
        index = np.arange(4)
        stage.run_step([{"index": index, "position": index, **stage.fetch(index, index, 0)}], step)
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"encoder.mean", "encoder.components", "head.weight", "head.bias"}


def test_a_residual_is_trained_too():
    encoder = ComponentsEncoder(SHAPE, 3, 16, residual=VolumeCNN(SHAPE, (4,), 8), residual_share=0.25)
    network = SupervisedNetwork(encoder.requires_grad_(False))
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_weights_to_start_from_keep_what_they_have_measured(tmp_path):
    torch.manual_seed(1)
    encoder = ComponentsEncoder(SHAPE, 3, 16)
    encoder.components.normal_()
    save_file(encoder.state_dict(), tmp_path / "encoder.safetensors")
    stage = stage_of(diagnosis(), tmp_path, weights=str(tmp_path))
    stage.prepare(Accelerator(cpu=True), TrainerSettings(ema=None), Optim(), 0)
    assert torch.equal(stage.modules["network"].encoder.components, encoder.components.float())
    with pytest.raises(UserError, match="no such file"):
        stage_of(diagnosis(), tmp_path, weights=str(tmp_path / "none"))


def test_balanced_classes_weigh_the_same_and_the_loss_is_cross_entropy():
    network, truth = SupervisedNetwork(ComponentsEncoder(SHAPE, 3, 16)), np.array([1.0, 0, 0, 0])
    output, target = torch.tensor([0.3, -1.0, 0.2, 2.0]), torch.tensor(truth, dtype=torch.float32)
    expected = -np.log(np.where(truth == 1, expit(output), 1 - expit(output)))
    for balanced, weights in ((False, [1, 1, 1, 1]), (True, [2, 2 / 3, 2 / 3, 2 / 3])):
        task = diagnosis(balanced=balanced)
        task.fit(network, truth)
        np.testing.assert_allclose(task.losses(network, output, target), weights * expected, rtol=1e-5)


@pytest.mark.parametrize(("split", "rows"), [("train", slice(0, 15)), ("val", slice(16, 25))])
def test_too_few_labels_are_refused_with_the_split_and_the_remedy(tmp_path, split, rows):
    cohort = LabelledCohort()
    cohort.table.loc[rows, "age"] = np.nan
    with pytest.raises(UserError, match=rf"task=age: the {split} split has .*data\.split\.{split}") as refused:
        stage_of(NumberTask("age", "age"), tmp_path, cohort)
    assert "\n" not in str(refused.value)


def test_a_name_that_is_no_folder_is_refused():
    with pytest.raises(UserError, match=r"task\.name=\.\./x"):
        NumberTask("../x", "age")


def context_of(cohort, folder, split="h"):
    """A context of a run whose stage 3 has been trained on the split `split`."""
    Workspace(folder).stage("repr").publish({}, {"split_hash": split, "weights": {}})
    y = np.random.default_rng(0).normal(size=(len(cohort), 4)).astype(np.float32)
    twins = SupervisedTwins(Workspace(folder), cohort, "", torch.device("cpu"), 8)
    (folder / "evaluation").mkdir(exist_ok=True)
    return Context(
        model=None, table=cohort.table, volumes=cohort.volumes.batch, posterior=None, embeddings=y, untrained=None,
        out=folder / "evaluation", spacing=(4.5,) * 3, supervised=twins,
    )  # fmt: skip


def test_its_own_predictions_are_scored_on_the_rows_of_the_probe(tmp_path):
    cohort = LabelledCohort()
    run = fit(stage_of(diagnosis(), tmp_path, cohort), tmp_path, steps=30)
    context = context_of(cohort, tmp_path)
    metrics = dict(Probes({"diagnosis": DIAGNOSIS, "age": Regression("age")}, ["mean", "supervised"], 50)(context))
    (network,) = [run.module("network", {"_target_": "ldae.models.supervised_network.SupervisedNetwork",
                                         "encoder": ENCODER})]  # fmt: skip
    expected = expit(network(cohort.x[26:]).numpy())
    scored = pd.read_csv(context.out / "diagnosis_predictions.csv")
    np.testing.assert_allclose(scored["supervised"], expected, atol=1e-6)
    assert list(scored["subject"]) == list(cohort.table["subject"][26:])
    ours, twin = metrics["probe/diagnosis/auc"], metrics["baseline/supervised/diagnosis/auc"]
    assert twin > 0.9  # the mean of a scan tells the class, and y of this context is noise
    assert metrics["baseline/supervised/diagnosis/auc_difference"] == pytest.approx(ours - twin)
    assert metrics["baseline/supervised/diagnosis/auc_difference_high"] < 0
    assert "supervised" not in json.loads((context.out / "probes.json").read_text())["probes"]["diagnosis"]
    (line,) = [text for text in context.skipped if "supervised" in text]  # there is none for age
    assert "for age" in line
    assert "train.py stage=supervised task=age name=" in line
    assert not any(name.startswith("baseline/supervised/age") for name in metrics)


def test_a_network_of_another_column_or_an_unfinished_one_is_not_scored(tmp_path):
    run = fit(stage_of(diagnosis(), tmp_path), tmp_path)
    twins = context_of(LabelledCohort(), tmp_path).supervised
    assert twins.reason_absent("diagnosis", DIAGNOSIS) is None
    reason = twins.reason_absent("diagnosis", Classification("diagnosis", "MCI", "CN"))
    assert "CN or AD" in reason
    assert "CN or MCI" in reason
    (run.path / "progress.json").write_text(json.dumps({**run.progress, "finished": False}))
    assert "not finished" in twins.reason_absent("diagnosis", DIAGNOSIS)


def test_a_network_of_another_split_is_refused_here_and_for_other_cohorts(tmp_path):
    cohort = LabelledCohort()
    fit(stage_of(diagnosis(), tmp_path, cohort), tmp_path)
    twins = context_of(cohort, tmp_path).supervised
    twins.refuse_unfit(["diagnosis", "age"])
    cohort.accepts_split = lambda split_hash: split_hash == "other"
    with pytest.raises(UserError, match="another split"):
        twins.refuse_unfit(["diagnosis"])
    elsewhere = SupervisedTwins(Workspace(tmp_path), cohort, "external/", torch.device("cpu"), 8)
    elsewhere.refuse_unfit(["diagnosis"])  # its subjects are in no split of the run
    Workspace(tmp_path).stage("repr").publish({}, {"split_hash": "newer"})
    with pytest.raises(UserError, match="another split"):
        elsewhere.refuse_unfit(["diagnosis"])


def test_cross_validation_says_why_it_has_none(tmp_path):
    context = context_of(LabelledCohort(), tmp_path)
    metrics = dict(CrossValidation({"diagnosis": DIAGNOSIS}, baselines=["mean", "supervised"], repeats=1)(context))
    assert not any("supervised" in name for name in metrics)
    (line,) = context.skipped
    assert "supervised is not computed in cross-validation" in line


def test_the_scripts_train_two_tasks_side_by_side_and_score_them(smoke, tmp_path):
    import shutil

    shutil.copytree(smoke, tmp_path, dirs_exist_ok=True)
    for task in ("diagnosis", "age"):
        run_script("train", "experiment=smoke", "stage=supervised", f"task={task}", cwd=tmp_path)
        assert Run(tmp_path / "runs/smoke/supervised" / task).progress["finished"]
    run_script("evaluate", "experiment=smoke", "evaluation=[probes]", "probe=age", cwd=tmp_path)
    metrics = json.loads((tmp_path / "runs/smoke/evaluation/metrics.json").read_text())
    assert {"baseline/supervised/age/mae", "baseline/supervised/age/mae_difference_low"} <= metrics.keys()
    assert re.search("trained on the label itself", (tmp_path / "runs/smoke/evaluation/report.html").read_text())
