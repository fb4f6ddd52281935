"""Every model config composes and builds, the published one with its number of parameters; bad sizes are refused."""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ldae.config import check_constructor_arguments, compose_config
from ldae.models.sizes import check_strides, check_volume_shape
from ldae.runs import estimator_node
from ldae.utils.errors import UserError

PUBLISHED = {"autoencoder": 13_766_248, "unet": 486_927_363, "estimator": 378_411_779, "encoder": 53_588_065}


def compose_model(name: str, *overrides: str):
    """The resolved config of model=`name`, for volumes of 128x160x128."""
    predicts = "+diffusion.parameterisation._target_=ldae.diffusion.process.Velocity"
    view = "+data.view={channels: 1, shape: [128,160,128], spacing: 1.5}"
    around = [predicts, "+diffusion.schedule.timesteps=1000", "+data.shape=[128,160,128]", view]
    config = compose_config(f"model/{name}", [*around, *overrides])
    OmegaConf.resolve(config)
    check_constructor_arguments(config.model, "model")
    return config.model


def count_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def build(config) -> dict[str, torch.nn.Module]:
    nodes = {name: config[name] for name in ("autoencoder", "unet", "encoder")}
    nodes["estimator"] = estimator_node(config.unet, config.encoder.dim, config.estimator)
    with torch.device("meta"):
        return {name: instantiate(node) for name, node in nodes.items()}


@pytest.mark.parametrize("name", ["published", "base", "small", "tiny"])
def test_presets_build_and_fit_together(name):
    config = compose_model(name)
    modules = build(config)
    check_volume_shape((128, 160, 128), config.autoencoder, config.unet)
    assert modules["autoencoder"].latent_channels == modules["unet"].architecture.in_channels
    if name == "published":
        assert {n: count_parameters(m) for n, m in modules.items()} == PUBLISHED


def test_one_network_can_be_chosen_by_itself_and_voxel_space_follows():
    config = compose_model("tiny", "model/autoencoder=identity")
    assert config.unet.in_channels == 1
    assert compose_model("published", "model/unet=tiny").unet.base == 32


def test_resampling_is_isotropic_by_default_and_anisotropic_as_published():
    strides = {name: build(compose_model(name))["unet"].strides for name in ("published", "base")}
    assert strides == {"published": (1, 4, 4), "base": (4, 4, 4)}


def test_sizes_that_do_not_divide_are_refused_by_axis():
    check_strides((128, 160, 128), (8, 8, 8), (1, 4, 4))
    with pytest.raises(UserError, match=r"size 150 along y does not divide by 32; use 128 or 160"):
        check_strides((128, 150, 128), (8, 8, 8), (1, 4, 4))
    config = compose_model("tiny")
    with pytest.raises(UserError, match=r"along z does not divide by 8"):
        check_volume_shape((40, 48, 44), config.autoencoder, config.unet)


def test_a_mistyped_architecture_key_is_refused_with_its_name():
    with pytest.raises(UserError, match=r"model.unet.bass"):
        compose_model("tiny", "+model.unet.bass=3")
