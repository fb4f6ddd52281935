"""Stage 3 with principal components in y: fitted to the training scans alone, not trained, computed once for each scan,
kept in checkpoints, and shared by two processes; and what the evaluation takes for its untrained encoder."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from ldae.config import Optim, TrainerSettings
from ldae.diffusion.samplers import DDIM
from ldae.models.components_encoder import ComponentsEncoder
from ldae.models.volume_cnn import VolumeCNN
from ldae.stages.frozen_encoder import KnownEmbeddings
from ldae.stages.repr import ReprStage
from ldae.training.checkpoint import Checkpoints, Progress
from small_stages import SHAPE, FinishedWorkspace, MadeUpCohort, batch, workspace_with_latents

VIEW = (1, *SHAPE)


def components_stage(folder, residual: bool = False, cohort=None, **options) -> ReprStage:
    """Stage 3 whose encoder has three components of the four training scans, without or with a residual."""
    cohort = cohort or MadeUpCohort()
    torch.manual_seed(0)
    extra = {"residual": VolumeCNN(VIEW, (4, 8), 16), "residual_share": 0.25} if residual else {}
    folder.mkdir(exist_ok=True)
    workspace = FinishedWorkspace(folder)
    if not workspace.latents.exists():
        workspace_with_latents(folder, cohort)
    return ReprStage(
        encoder=ComponentsEncoder(VIEW, 3, 32, **extra), estimator=OmegaConf.create({"modes": 2}),
        sampler=DDIM(steps=2), time_power=1.0, other_visit=0.0, aekl=None, pretrain=None, latents=None,
        cohort=cohort, workspace=workspace, **{"initial_weights": None, **options},
    )  # fmt: skip


def prepared(stage, **settings):
    stage.prepare(Accelerator(cpu=True), TrainerSettings(**{"ema": 0.5, **settings}), Optim(lr=1e-3), 0)
    return stage


def tensors(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def test_components_are_those_of_the_training_scans_alone(tmp_path):
    cohort = MadeUpCohort()
    encoder = prepared(components_stage(tmp_path, cohort=cohort)).modules["encoder"]
    torch.testing.assert_close(encoder.mean, cohort.x[:4].mean(0))
    y = encoder(cohort.x[:4])
    torch.testing.assert_close(y.square().mean(), torch.ones(()), atol=2e-3, rtol=0)
    torch.testing.assert_close(y.mean(0), torch.zeros(32), atol=1e-4, rtol=0)
    cohort.x[4:] = 0  # validation scans
    (tmp_path / "other").mkdir()
    other = prepared(components_stage(tmp_path / "other", cohort=cohort)).modules["encoder"]
    assert all(torch.equal(one, two) for one, two in zip(encoder.buffers(), other.buffers(), strict=True))


def test_only_the_estimator_is_trained_and_both_are_published(tmp_path):
    stage = prepared(components_stage(tmp_path))
    before, estimator = tensors(stage.modules["encoder"]), tensors(stage.modules["estimator"])
    for step in range(2):
        result = stage.run_step([batch(stage, [0, 1]), batch(stage, [2, 3])], step)
    assert torch.isfinite(result.scalars["loss"])
    assert all(torch.equal(before[name], tensor) for name, tensor in stage.modules["encoder"].state_dict().items())
    assert any(not torch.equal(estimator[n], t) for n, t in stage.modules["estimator"].state_dict().items())
    assert [len(group["params"]) > 0 for group in stage.optimizers["conditioner"].param_groups] == [True]
    assert set(stage.averages) == {"estimator"}
    assert set(stage.weights()) == {"encoder", "estimator"}
    assert {"ssim", "z0_error/own_t800"} <= stage.validate().keys()


def test_the_loss_is_that_of_an_encoder_that_is_called_in_every_step(tmp_path):
    stage = prepared(components_stage(tmp_path))
    first = batch(stage, [0, 1, 2])
    assert "x" in first
    embedded = stage.embed_batch(first)
    torch.testing.assert_close(embedded["y"], stage.modules["encoder"](stage.cohort.x[:3]))
    again = batch(stage, [0, 2])
    assert "x" not in again, "y of these scans is known, so that they are not read"
    assert torch.equal(stage.embed_batch(again)["y"], embedded["y"][[0, 2]])


def test_augmented_views_are_read_and_embedded_anew(tmp_path):
    cohort = MadeUpCohort()
    cohort.draw_view_augmentation = lambda seed, keys: {"shift": torch.tensor(keys, dtype=torch.float32)}
    cohort.augment = lambda x, drawn: x + 0.1 * drawn["shift"].view(-1, 1, 1, 1, 1)
    stage = prepared(components_stage(tmp_path, cohort=cohort))
    for positions in ([0, 1], [5, 7]):
        fetched = {"index": np.array([0, 1]), **stage.fetch(np.array([0, 1]), np.array(positions), 0)}
        shifted = cohort.x[:2] + 0.1 * torch.tensor(positions).view(-1, 1, 1, 1, 1)
        torch.testing.assert_close(stage.embed_batch(fetched)["y"], stage.modules["encoder"](shifted))


def test_y_of_a_scan_is_the_same_to_the_bit_in_whatever_batch_it_is_first_needed():
    layer, x = nn.Linear(300, 16), torch.randn(6, 300)
    tables = [KnownEmbeddings(layer, 16, 6, torch.device("cpu")) for _ in range(2)]
    everything = np.arange(6)
    tables[0](everything, torch.from_numpy(everything), x)
    for part in ([4, 1], [0, 5, 2], [3]):
        tables[1](np.array(part), torch.tensor(part), x[part])
    assert torch.equal(tables[0].y, tables[1].y)
    assert tables[1].has(everything)


@pytest.mark.parametrize("residual", [False, True])
def test_a_resumed_training_continues_to_the_bit_with_the_stored_components(tmp_path, monkeypatch, residual):
    def steps(stage, numbers):
        for number in numbers:
            torch.manual_seed(number)
            result = stage.run_step([batch(stage, [number % 4, (number + 1) % 4])], number)
        return result

    whole = prepared(components_stage(tmp_path / "whole", residual))
    steps(whole, range(4))
    first = prepared(components_stage(tmp_path / "parts", residual))
    steps(first, range(2))
    checkpoints = Checkpoints(tmp_path / "parts" / "repr" / "state", keep=2)
    checkpoints.save(first, Progress(step=2), None, {})

    def refused(*_, **__):
        raise AssertionError("fitted again")

    monkeypatch.setattr("ldae.stages.fit_encoder.ComponentsFit", refused)
    second = prepared(components_stage(tmp_path / "parts", residual))
    checkpoints.restore(checkpoints.newest(), second, None, {})
    steps(second, range(2, 4))
    for name, module in whole.modules.items():
        after = second.modules[name].state_dict()
        assert all(torch.equal(tensor, after[key]) for key, tensor in module.state_dict().items())
    for name, average in whole.averages.items():
        assert all(torch.equal(t, second.averages[name].state_dict()[key]) for key, t in average.state_dict().items())


def test_a_residual_is_trained_and_averaged_while_the_components_stay(tmp_path):
    stage = prepared(components_stage(tmp_path, residual=True))
    encoder = stage.modules["encoder"]
    before = tensors(encoder)
    for step in range(3):  # the estimator's output, then the residual's reading, start at 0
        stage.run_step([batch(stage, [0, 1]), batch(stage, [2, 3])], step)
    changed = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, _ in encoder.named_parameters()}
    average = stage.averages["encoder"].state_dict()
    assert all(torch.equal(average[name], before[name]) for name in before.keys() - changed)
    assert stage.embeddings is None
    torch.testing.assert_close(encoder.residual.mean_volume, stage.cohort.x[:4].mean(0, keepdim=True))


def test_components_of_another_run_are_replaced_unless_they_are_to_be_kept(tmp_path):
    start = components_stage(tmp_path / "start")
    for name, module in start.modules.items():
        weights = {
            key: torch.randn_like(tensor.float()).to(tensor.dtype) for key, tensor in module.state_dict().items()
        }
        save_file(weights, tmp_path / f"{name}.safetensors")
    own = prepared(components_stage(tmp_path / "own")).modules["encoder"]
    found = {
        keep: prepared(components_stage(tmp_path / str(keep), initial_weights=str(tmp_path), keep_components=keep))
        for keep in (False, True)
    }
    assert torch.equal(found[False].modules["encoder"].components, own.components)
    assert not torch.equal(found[True].modules["encoder"].components, own.components)


def test_more_components_than_training_scans_are_noted(tmp_path, caplog):
    stage = components_stage(tmp_path)
    stage.modules["encoder"] = ComponentsEncoder(VIEW, 10, 32)
    encoder = prepared(stage).modules["encoder"]
    assert "10, but 4 training scans have only 3" in caplog.text
    assert not encoder.components[3:].any()
    assert torch.isfinite(encoder(stage.cohort.x)).all()


def test_an_untrained_encoder_has_the_components_and_nothing_random(tmp_path):
    from ldae.evaluation.initial_encoder import build_initial_encoder, count_draws

    for residual in (False, True):
        stage = prepared(components_stage(tmp_path / str(residual), residual))
        trained = stage.modules["encoder"]
        cnn = {"_target_": "ldae.models.volume_cnn.VolumeCNN", "shape": list(VIEW), "widths": [4, 8], "dim": 16}
        node = {
            "_target_": "ldae.models.components_encoder.ComponentsEncoder", "shape": list(VIEW), "components": 3,
            "dim": 32, "residual": cnn if residual else None, "residual_share": 0.25 if residual else 0.0,
        }  # fmt: skip
        config = OmegaConf.create({"seed": 0, "stage": {"_target_": "ldae.stages.repr.ReprStage", "encoder": node}})
        run = SimpleNamespace(config=config)
        assert count_draws(run) == 1
        y = build_initial_encoder(run, 0, trained)(stage.cohort.x)
        torch.testing.assert_close(y, trained(stage.cohort.x))
        assert y.square().mean() > 0.1


def test_the_evaluation_of_attention_says_in_one_line_that_there_is_none():
    from ldae.evaluation.images.attention import Attention

    said = []
    model = SimpleNamespace(encoder=ComponentsEncoder(VIEW, 3, 32))
    context = SimpleNamespace(model=model, sample_rows=lambda *_: [0], skip=said.append)
    assert list(Attention()(context)) == []
    assert ["does not weigh slices" in line for line in said] == [True]
