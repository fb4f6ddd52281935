"""Proves that every experiment, stage and group option composes, and that a mistake is named with its full key."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from faults.scripts import run_script
from ldae.config import check_constructor_arguments, compose_config, conf_dir
from ldae.utils.errors import UserError

STAGES = ("aekl", "pretrain", "repr", "prior", "supervised")


def group(name):
    return sorted(p.stem for p in (conf_dir() / name).glob("*.yaml"))


def composed(*overrides, primary="train"):
    return compose_config(primary, overrides)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("experiment", group("experiment"))
def test_every_experiment_composes_for_every_stage(stage, experiment):
    config = composed(f"stage={stage}", f"experiment={experiment}", "data.table=scans.csv")
    OmegaConf.resolve(config)
    assert config.trainer.max_steps or config.trainer.max_epochs


@pytest.mark.parametrize("primary", ["encode_latents", "evaluate"])
@pytest.mark.parametrize("experiment", group("experiment"))
def test_every_experiment_composes_for_the_other_scripts(primary, experiment):
    OmegaConf.resolve(composed(f"experiment={experiment}", "data.table=scans.csv", primary=primary))


@pytest.mark.parametrize(
    "choice",
    [f"{name}={option}" for name in ("model", "diffusion", "sampler", "optim", "loss", "trainer", "accelerator", "data",
     "perceptual", "evaluation", "probe", "stage_settings", "+data/augmentation", "data/view", "model/prior", "task")
     for option in group(name.removeprefix("+"))],
)  # fmt: skip
def test_every_group_option_composes_and_its_arguments_exist(choice):
    required = {
        "perceptual=lpips": ["perceptual.backbone=a", "perceptual.heads=b"],
        "perceptual=published": ["perceptual.backbone=a", "perceptual.heads=b"],
        "perceptual=medicalnet": ["perceptual.weights=c"],
        "data=table": ["data.table=scans.csv"],
        "task=number": ["task.column=height"],
        "task=classes": ["task.column=group", "task.positive=patient", "task.negative=control"],
    }
    name, option = choice.split("=")
    override = f"{name}=[{option}]" if name in ("evaluation", "probe") else choice
    config = composed("stage=repr", override, *required.get(choice, []))
    OmegaConf.resolve(config)
    check_constructor_arguments(config)


def test_a_single_network_of_a_model_can_be_replaced():
    config = composed("stage=pretrain", "model=base", "model/unet=tiny")
    assert config.model.unet.base == composed("stage=pretrain", "model=tiny").model.unet.base
    assert config.model.unet.in_channels == config.model.autoencoder.latent_channels
    assert config.model.autoencoder == composed("stage=pretrain", "model=base").model.autoencoder


@pytest.mark.parametrize("override", ["trainer.max_stepz=3", "optim.l=1", "nam=x"])
def test_a_mistyped_override_fails_with_its_key(override):
    with pytest.raises(ConfigCompositionException, match=override.split("=")[0]):
        composed("stage=aekl", override)


def test_a_typo_in_a_file_fails_with_the_full_key(tmp_path):
    import shutil

    folder = tmp_path / "conf"
    shutil.copytree(conf_dir(), folder)
    (folder / "experiment" / "typo.yaml").write_text("# @package _global_\ntrainer:\n  max_stepz: 3\n")
    with (
        initialize_config_dir(str(folder), version_base="1.3"),
        pytest.raises(ConfigCompositionException) as caught,
    ):
        compose("train", ["stage=aekl", "experiment=typo"])
    assert "trainer.max_stepz" in str(caught.value) + str(caught.value.__cause__)


def test_an_argument_that_a_class_does_not_take_is_named_in_full():
    config = composed("stage=aekl", "+model.unet.bse=3")
    with pytest.raises(UserError, match=r"model\.unet\.bse"):
        check_constructor_arguments(config)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("evaluation.manipulation.scans=4x", r"evaluation\.manipulation\.scans=4x: a whole number is needed"),
        ("evaluation.manipulation.shown=one", r"evaluation\.manipulation\.shown=one: a number is needed"),
        ("evaluation.probes.head_size=trux", r"evaluation\.probes\.head_size=trux: true or false is needed"),
    ],
)
def test_text_is_refused_where_a_class_takes_a_number(override, says):
    config = compose_config("evaluate", ["experiment=smoke", "evaluation=[manipulation,probes]", override])
    with pytest.raises(UserError, match=says):
        check_constructor_arguments(config)


def test_a_renamed_argument_is_refused_with_its_new_name():
    config = composed("stage=aekl", "+model.autoencoder.tile=4")
    with pytest.raises(UserError, match=r"'model\.autoencoder\.tile' is now 'model\.autoencoder\.inference_planes'"):
        check_constructor_arguments(config)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "stage=aekl", "data=table"], "data.table"),
        (["train", "stage=aekl", "data=table", "data.table=nowhere.csv"], "nowhere.csv"),
        (["train", "stage=aekl", "experiment=smoke", "data.shape=[24,23,24]"], "23"),
        (["train", "stage=repr", "experiment=smoke"], "stage=aekl"),
        (["train", "stage=aekl", "trainer.max_stepz=1"], "trainer.max_stepz"),
        (["evaluate", "experiment=smoke"], "stage=aekl"),
    ],
)
def test_a_wrong_input_gives_one_line_and_a_non_zero_exit_status(tmp_path, arguments, says):
    result = run_script(*arguments, cwd=tmp_path, check=False)
    assert result.returncode != 0
    assert says in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "data").exists(), "the mistake is reported before anything is made"


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", ["train", "encode_latents", "evaluate"])
def test_help_needs_no_other_argument(tmp_path, name, flag):
    assert "experiment" in run_script(name, flag, cwd=tmp_path).stdout
