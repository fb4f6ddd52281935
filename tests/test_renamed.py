"""Stored configs with former names of classes and arguments build what they always did."""

import inspect

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from ldae.config import check_constructor_arguments
from ldae.models.autoencoder import AutoencoderKL
from ldae.models.semantic_encoder import SemanticEncoder
from ldae.models.slice_cnn import SliceCNN
from ldae.models.unet import UNet
from ldae.models.voxel_prior import VoxelPrior
from ldae.utils.errors import UserError
from ldae.utils.renamed import ARGUMENTS, CLASSES, MODULES, present_name, with_present_names

STORED = {
    "autoencoder": {
        "_target_": "ldae.models.autoencoder.AutoencoderKL", "channels": [4, 8], "residual_blocks": 1, "groups": 2,
        "reference": [8, 8, 4], "tile": 3,
    },
    "encoder": {
        "_target_": "ldae.models.semantic_encoder.SemanticEncoder", "slices": 4, "dim": 8, "heads": 2,
        "reference": [8, 8, 4], "gated": True,
        "backbone": {"_target_": "ldae.models.slice_cnn.SliceCNN", "size": [8, 8], "out_channels": 8, "looks": 3},
    },
    "unet": {
        "_target_": "ldae.models.unet.UNet", "base": 8, "multipliers": [1, 2], "groups": 4,
        "prior": {
            "_target_": "ldae.models.voxel_prior.VoxelPrior", "channels": 3, "nodes": 5, "timesteps": 10,
            "parameterisation": {"_target_": "ldae.diffusion.process.Velocity"},
        },
    },
}  # fmt: skip


def load(name):
    return instantiate(with_present_names(STORED[name]))


def test_an_autoencoder_stored_with_former_names_builds():
    autoencoder = load("autoencoder")
    assert isinstance(autoencoder, AutoencoderKL)
    assert autoencoder.mean_latent.shape == (1, 3, 4, 4, 2)
    assert autoencoder.inference_planes == 3


def test_an_encoder_stored_with_former_names_builds():
    encoder = load("encoder")
    assert isinstance(encoder, SemanticEncoder)
    assert isinstance(encoder.backbone, SliceCNN)
    assert encoder.mean_volume.shape == (1, 1, 8, 8, 4)
    assert encoder.gate is not None
    assert len(encoder.backbone.where) == 3
    assert encoder(torch.rand(1, 1, 8, 8, 4)).shape == (1, 8)


def test_a_unet_stored_with_former_names_builds():
    unet = load("unet")
    assert isinstance(unet, UNet)
    assert isinstance(unet.prior, VoxelPrior)
    assert unet.prior.mean.shape == (1, 3, 5, 5, 5)


def test_a_name_that_is_present_already_wins():
    node = {**STORED["autoencoder"], "mean_latent_for": [4, 4, 4]}
    assert with_present_names(node)["mean_latent_for"] == [4, 4, 4]
    assert with_present_names(STORED["autoencoder"])["mean_latent_for"] == [8, 8, 4]


@pytest.mark.parametrize("name", STORED)
def test_former_names_on_the_command_line_are_refused_with_the_present_one(name):
    with pytest.raises(UserError, match=rf"'model\.{name}\S*' is now 'model\.{name}\S*'"):
        check_constructor_arguments(OmegaConf.create(STORED[name]), f"model.{name}")


@pytest.mark.parametrize("target", ARGUMENTS)
def test_present_arguments_are_taken_and_former_ones_are_not(target):
    taken = inspect.signature(get_class(target)).parameters
    assert set(ARGUMENTS[target].values()) <= taken.keys()
    assert not set(ARGUMENTS[target]) & taken.keys()


@pytest.mark.parametrize("former", [*CLASSES, *(f"{module}.X" for module in MODULES)])
def test_present_paths_exist_and_are_not_renamed_again(former):
    present = present_name(former)
    assert present_name(present) == present
    if former in CLASSES:
        assert get_class(present).__name__ == present.rpartition(".")[2]
