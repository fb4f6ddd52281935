"""Proves that the networks compute what the official ones do from the released checkpoints, to a relative 1e-3, and
that the names of all tensors agree.

The public methods of LDAE are compared on stand-in weights (shared/fixtures/official) that are converted in memory. The
conversion through files is tested with small networks in test_official_import.py, because it would write 7 GB here.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from ldae import LDAE
from ldae.bundle import official_weights as official
from ldae.bundle.import_official import SCALE, SHAPE, published_configs
from ldae.denoiser import Denoiser
from ldae.diffusion.process import Epsilon
from ldae.diffusion.samplers import DDIM
from ldae.diffusion.schedule import linear
from ldae.models.state import load_strictly

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "official"
with_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason=f"the stand-in checkpoints are not at {FIXTURES}")

TOLERANCE = 1e-3
DIM = 768


def fill():
    spec = importlib.util.spec_from_file_location("fill", FIXTURES / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(file: str) -> dict[str, torch.Tensor]:
    """The stand-in for one released file, in float32 like the release."""
    tensors = {name: torch.from_numpy(value).float() for name, value in fill().state_dict(file).items()}
    if file == "encoder.pth":
        tensors[official.POSITIONS] = official.sinusoidal_positions(128, DIM)
    return tensors


def published() -> dict[str, torch.nn.Module]:
    """The four networks on the meta device."""
    with torch.device("meta"):
        return {name: instantiate(config) for name, config in published_configs().items()}


@pytest.fixture(scope="module")
def model():
    """The stand-in weights as an LDAE."""
    networks = published()
    converted = {
        "autoencoder": official.convert_autoencoder(networks["autoencoder"], stand_in("autoencoderkl.pth"), "a"),
        "encoder": official.convert_encoder(networks["encoder"], stand_in("encoder.pth"), "e"),
    }
    pair = official.convert_decoder(networks["unet"], networks["estimator"], stand_in("decoder.pth"), "d")
    converted |= dict(zip(("unet", "estimator"), pair, strict=True))
    for name, network in networks.items():
        load_strictly(network, converted[name], name, assign=True)
    denoiser = Denoiser(networks["unet"], networks["estimator"], linear(), Epsilon())
    parts = networks["autoencoder"], networks["encoder"], denoiser
    return LDAE(*parts, scale=[SCALE] * 3, sampler=DDIM(), shape=SHAPE, device="cpu")


@pytest.fixture(scope="module")
def given():
    return {name: torch.from_numpy(value) for name, value in fill().inputs().items()}


@pytest.fixture(scope="module")
def expected():
    with np.load(FIXTURES / "expected.npz", allow_pickle=False) as archive:
        return {name: torch.from_numpy(archive[name].astype(np.float32)) for name in archive.files}


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() < TOLERANCE * wanted.norm()
    assert (found - wanted).abs().max() < TOLERANCE * wanted.abs().max()


@with_fixtures
def test_noise_and_gradient_are_those_of_the_official_networks(model, given, expected):
    z, t = given["latent"], given["timestep"]
    # Samples of a batch are independent, so half of the batch is enough for each.
    assert_same(model.predict_noise(z[:1], t[:1]), expected["unet_noise"][:1])
    assert torch.equal(expected["unet_noise"], expected["decoder_noise"])
    assert_same(model.estimate_gradient(z[1:], t[1:], given["semantic"][1:]), expected["decoder_gradient"][1:])


@with_fixtures
def test_embeddings_are_those_of_the_official_encoder(model, given, expected):
    x = given["slices"].permute(0, 1, 3, 4, 2)  # (batch, channel, slice, x, y) -> (B, C, X, Y, Z)
    assert_same(model.embed(x), expected["y_sem"])


@with_fixtures
def test_latents_and_reconstructions_are_those_of_the_official_autoencoder(model, given, expected):
    mean, std = model.posterior(given["volume"])
    assert_same(mean, expected["latent_mean"])
    assert_same(std, expected["latent_sigma"])
    assert_same(model.decompress(0.8730 * expected["latent_mean"]), expected["reconstruction"])


@with_fixtures
def test_tensor_names_are_exactly_those_of_the_release():
    layout = json.loads((FIXTURES / "layout.json").read_text())
    wanted = {"autoencoder": "autoencoderkl.pth", "encoder": "encoder.pth", "unet": "pretrained_unet"}
    modules = published()
    namers = {n: getattr(official, f"official_{n}_name") for n in ("autoencoder", "encoder", "unet", "estimator")}
    found = {name: {namers[name](key) for key in module.state_dict()} for name, module in modules.items()}
    for name, file in wanted.items():
        extra = {k for k in layout[file] if k.startswith(official.BACKBONE_COPY) or k == official.POSITIONS}
        assert found[name] == set(layout[file]) - extra
    assert found["unet"] | found["estimator"] == set(layout["decoder.pth"])
