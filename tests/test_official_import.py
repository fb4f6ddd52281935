"""Proves that released files become a bundle with the settings that they imply, and that tensors that do not fit are
named.

The networks are small and have the tensor names of the release.
"""

import re
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from ldae import LDAE
from ldae.bundle import import_official as official_bundle
from ldae.bundle import official_weights as official
from ldae.bundle.import_official import import_official, published_configs
from ldae.diffusion.guidance import Score
from ldae.utils.errors import UserError

DIM = 768


def narrow() -> dict[str, dict[str, Any]]:
    """The published configs with narrow networks and a short encoder: the same tensor names, other shapes."""
    configs = published_configs()
    for name in ("unet", "estimator"):
        configs[name] |= {"base": 8, "groups": 4}
    configs["autoencoder"] |= {"channels": [8, 8, 8, 8], "groups": 4}
    configs["encoder"]["backbone"] |= {"widths": [4, 4, 8, DIM], "depths": [1, 1, 1, 1]}
    return configs


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """Files of probe, mean and std, and their values."""
    folder = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    weight, mean, std = rng.normal(size=DIM), rng.normal(size=DIM), rng.uniform(0.5, 2, DIM)
    torch.save({"weight": torch.from_numpy(weight)[None], "bias": torch.tensor([0.25])}, folder / "probe.pth")
    np.save(folder / "mean.npy", mean[None])
    torch.save(torch.from_numpy(std), folder / "std.pt")
    paths = {"probe": folder / "probe.pth", "mean": folder / "mean.npy", "std": folder / "std.pt"}
    return paths, weight, mean, std


def official_names(networks: dict[str, torch.nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    """Random tensors for `networks`, named and stored as in the release; the U-Net alone is "unet"."""
    torch.manual_seed(0)
    named = {
        name: {
            getattr(official, f"official_{name}_name")(key): torch.randn(value.shape)
            for key, value in network.state_dict().items()
        }
        for name, network in networks.items()
    }
    flat = {key for name in ("unet", "estimator") for key in named[name] if re.search(r"(qkv|proj_out).weight$", key)}
    for name in ("unet", "estimator"):
        named[name] = {key: value[..., None] if key in flat else value for key, value in named[name].items()}
    prefix, copy = official.BACKBONE, official.BACKBONE_COPY
    copies = {copy + key.removeprefix(prefix): v for key, v in named["encoder"].items() if key.startswith(prefix)}
    positions = {official.POSITIONS: official.sinusoidal_positions(128, DIM)}
    return {**named, "encoder": named["encoder"] | copies | positions, "decoder": named["unet"] | named["estimator"]}


def small_release() -> tuple[dict[str, torch.nn.Module], dict[str, dict[str, torch.Tensor]]]:
    """Small networks on the meta device, and tensors for them."""
    with torch.device("meta"):
        networks = {name: instantiate(config) for name, config in narrow().items()}
    return networks, official_names(networks)


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Files of a small release; the import is patched to its sizes."""
    configs, (_, tensors) = narrow(), small_release()
    monkeypatch.setattr(official_bundle, "published_configs", lambda: configs)
    paths = {name: tmp_path / f"{name}.pth" for name in ("autoencoder", "encoder", "decoder")}
    for name, path in paths.items():
        torch.save(tensors[name], path)
    checkpoint = {"state_dict": {f"ema_unet.{key}": value for key, value in tensors["unet"].items()}, "epoch": 3}
    torch.save(checkpoint, tmp_path / "unet.ckpt")
    return {**paths, "unet": tmp_path / "unet.ckpt"}


def test_the_bundle_has_the_weights_and_the_settings_that_they_imply(files, probe, tmp_path):
    model = LDAE.load(import_official(**files, **probe[0], out=tmp_path / "bundle"), device="cpu")
    stored = torch.load(files["decoder"], weights_only=True)
    assert torch.equal(model.denoiser.unet.path.conv.weight, stored["out.2.weight"])
    assert torch.equal(model.denoiser.estimator.path.conv.weight, stored["shift_out.2.weight"])
    assert model.scale.flatten().tolist() == pytest.approx([0.8730] * 3)
    assert (model.transform.orientation, model.transform.spacing, model.shape) == ("LAS", (1.5,) * 3, (128, 160, 128))
    assert type(model.transform.intensity).__name__ == "MinMax"
    assert model.denoiser.unet.strides == (1, 4, 4)
    assert isinstance(model.sampler.guidance.form, Score)
    assert (model.sampler.end, model.sampler.clip) == ("published", None)
    assert float(model.denoiser.schedule.alpha_bar[0]) == pytest.approx(1 - 1e-4)


def test_the_positive_class_of_the_imported_probe_is_ad(files, probe, tmp_path):
    paths, weight, mean, std = probe
    model = LDAE.load(import_official(**files, **paths, out=tmp_path / "bundle"), device="cpu")
    y = np.zeros((1, DIM))
    assert model.probes["diagnosis"].classes == ("CN", "AD")
    towards_cn = ((y - mean) / std) @ weight + 0.25
    np.testing.assert_allclose(model.probes["diagnosis"].decision(y), -towards_cn)
    np.testing.assert_allclose(model.direction("diagnosis").unit, -weight / np.linalg.norm(weight))


def test_a_training_checkpoint_of_another_unet_is_refused(files, tmp_path):
    checkpoint = torch.load(files["unet"], weights_only=True)
    checkpoint["state_dict"]["ema_unet.middle_block.1.qkv.bias"] += 1
    torch.save(checkpoint, files["unet"])
    with pytest.raises(UserError, match=r"'middle_block.1.qkv.bias' is not what .*decoder.pth holds"):
        import_official(**files, out=tmp_path / "bundle")
    assert not (tmp_path / "bundle" / "bundle.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"middle_block.1.qkv.bias": None}, "'middle_block.1.qkv.bias' is missing"),
        ({"out.2.bias": torch.zeros(7)}, r"'out.2.bias' is \(7,\), not \(3,\)"),
        ({"output_blocks.9.0.x": torch.zeros(1)}, "unexpected tensor 'output_blocks.9.0.x'"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_as_in_the_file(change, message):
    module, tensors = (part["unet"] for part in small_release())
    changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    with pytest.raises(UserError, match=f"unet.ckpt: .*{message}"):
        official.convert_unet(module, changed, "unet.ckpt")


def test_the_unet_of_a_training_checkpoint_is_found_by_its_prefix():
    module, tensors = (part["unet"] for part in small_release())
    prefixed = {f"ema_unet.{name}": value for name, value in tensors.items()}
    found = official.convert_unet(module, {**prefixed, "unet.time_embed.0.bias": torch.ones(3)}, "unet.ckpt")
    assert found.keys() == module.state_dict().keys()


def test_differing_backbone_copies_and_other_positions_are_refused():
    module, tensors = (part["encoder"] for part in small_release())
    assert official.convert_encoder(module, tensors, "encoder.pth")
    copy = official.BACKBONE_COPY + "backbone.features.0.0.bias"
    with pytest.raises(UserError, match="should be the same"):
        official.convert_encoder(module, {**tensors, copy: tensors[copy] + 1}, "encoder.pth")
    with pytest.raises(UserError, match="not the plain sinusoid"):
        official.convert_encoder(module, {**tensors, official.POSITIONS: torch.zeros(1, 128, 768)}, "encoder.pth")


def test_a_probe_needs_its_three_files(probe, tmp_path):
    files = dict.fromkeys(("autoencoder", "encoder", "decoder"), tmp_path / "absent.pth")
    with pytest.raises(UserError, match="all three files"):
        import_official(**files, probe=probe[0]["probe"], out=tmp_path / "b")
    with pytest.raises(UserError, match=r"absent.pth: there is no such file"):
        import_official(**files, out=tmp_path / "b")
    assert not (tmp_path / "b" / "bundle.json").exists()
