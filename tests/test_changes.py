"""Proves which settings may change when a run is resumed; each is marked as harmless where it is defined."""

import pytest
from omegaconf import DictConfig, OmegaConf

from ldae.config import compose_config
from ldae.runs import Run
from ldae.training.changes import changed_keys, check_changes
from ldae.utils.errors import UserError

# Keys that may change. All others that reach a training must not.
HARMLESS = {
    "trainer.max_steps", "trainer.max_epochs", "trainer.batch_size", "trainer.accumulate", "trainer.log_every",
    "trainer.validate_every", "trainer.validate_every_epochs", "trainer.preview_every", "trainer.checkpoint_every",
    "trainer.keep_states", "trainer.patience", "trainer.checkpointing", "trainer.compile", "trainer.channels_last",
    "trainer.cuda_graph",
    "trainer.workers", "trainer.max_skipped", "trainer.accept_changes", "accelerator.cpu", "accelerator.timeout",
    "accelerator._target_", "stage.estimator.start_from_unet", "stage.aekl", "stage.pretrain", "stage.latents",
    "stage.initial_weights", "stage.keep_components",
    "data.table", "data.workers", "data.on_bad_scan", "data.diagnoses",
    *(f"data.phantom.longitudinal.{name}" for name in ("subjects", "months", "seed")),
    "data.phantom.subjects", "data.phantom.seed", "data.phantom.spacing", "data.phantom.shape", "data.split.train",
    "data.split.val", "data.split.test", "data.split.seed", "data.split.fold", "data.split.folds", "data.split.extend",
}  # fmt: skip
COMPARED = ("seed", "stage", "trainer", "optim", "data", "accelerator")


def composed(stage: str) -> DictConfig:
    config = compose_config("train", [f"stage={stage}", "experiment=demo", "model=base", "optim.final_factor=1"])
    OmegaConf.resolve(config)
    return config


def keys(node: DictConfig, key: str = "") -> list[str]:
    """All keys below `node` that hold no group."""
    found = []
    for name in node:
        full = f"{key}.{name}" if key else str(name)
        found += keys(node[name], full) if isinstance(node[name], DictConfig) and len(node[name]) else [full]
    return found


@pytest.mark.parametrize("stage", ["aekl", "pretrain", "repr"])
def test_every_key_matters_unless_it_is_defined_as_harmless(stage: str) -> None:
    before = composed(stage)
    for key in keys(before):
        now = OmegaConf.create(OmegaConf.to_container(before))
        if key == "stage._target_":
            continue
        OmegaConf.update(now, key, "fp16" if key.endswith("mixed_precision") else "another", force_add=True)
        changes, harmless = changed_keys(before, now)
        unread = key.startswith("data.view.") and stage != "repr"  # only stage 3 reads the encoder's view
        expected = key.split(".")[0] not in COMPARED or key in HARMLESS or unread
        assert ([line.split(":")[0] for line in changes], harmless) == (([], [key]) if expected else ([key], [])), key


def test_a_run_from_before_there_were_views_continues_with_the_t1_view_alone() -> None:
    now = composed("repr")
    before = OmegaConf.create({**now, "data": {key: value for key, value in now.data.items() if key != "view"}})
    assert changed_keys(before, now) == ([], [])
    now.data.view._target_ = "another"
    assert "data.view._target_: None -> another" in changed_keys(before, now)[0]


def test_the_length_of_a_run_matters_where_the_learning_rate_decays_towards_its_end() -> None:
    before = composed("pretrain")
    before.optim.final_factor, before.trainer.max_steps = 0.1, 10
    now = OmegaConf.create(OmegaConf.to_container(before))
    now.trainer.max_steps = 20
    assert changed_keys(before, now) == (["trainer.max_steps: 10 -> 20"], [])
    now.optim.final_factor = before.optim.final_factor = 1.0
    assert changed_keys(before, now) == ([], ["trainer.max_steps"])


def test_a_change_is_refused_in_one_line_unless_it_is_accepted(tmp_path, caplog) -> None:
    run, config = Run(tmp_path), composed("pretrain")
    run.write_config(config)
    config.optim.lr = 0.5
    check_changes(run, config)  # no checkpoint yet: there is nothing to resume
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "step_00000002.json").touch()
    with pytest.raises(UserError, match=r"optim\.lr: .* -> 0\.5.*trainer\.accept_changes=true"):
        check_changes(run, config)
    config.trainer.accept_changes = True
    check_changes(run, config)
    assert "continues with other settings: optim.lr" in caplog.text
