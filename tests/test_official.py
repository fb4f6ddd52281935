"""Proves that the released checkpoints' layout is read right: every output within 1e-3 of the official networks'.

The stand-ins of shared/fixtures/official go the way of a user: files, `import_official`, `LDAE.load`, public methods.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate

from ldae import LDAE
from ldae.diffusion.guidance import Score
from ldae.errors import UserError
from ldae.models import official
from ldae.official_bundle import import_official, published_configs

FIXTURES = Path(__file__).parents[2] / "shared" / "fixtures" / "official"
pytestmark = pytest.mark.skipif(not FIXTURES.exists(), reason=f"the stand-in checkpoints are not at {FIXTURES}")

TOLERANCE = 1e-3
DIM = 768


def fill():
    spec = importlib.util.spec_from_file_location("fill", FIXTURES / "fill.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stand_in(file: str) -> dict[str, torch.Tensor]:
    """The stand-in for one released file."""
    tensors = {name: torch.from_numpy(value) for name, value in fill().state_dict(file).items()}
    if file == "encoder.pth":
        tensors[official.POSITIONS] = official.sinusoidal_positions(128, DIM)
    return tensors


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """Probe, mean and std as files."""
    folder = tmp_path_factory.mktemp("probe")
    rng = np.random.default_rng(0)
    weight, mean, std = rng.normal(size=DIM), rng.normal(size=DIM), rng.uniform(0.5, 2, DIM)
    torch.save({"weight": torch.from_numpy(weight)[None], "bias": torch.tensor([0.25])}, folder / "probe.pth")
    np.save(folder / "mean.npy", mean[None])
    torch.save(torch.from_numpy(std), folder / "std.pt")
    paths = {"probe": folder / "probe.pth", "mean": folder / "mean.npy", "std": folder / "std.pt"}
    return paths, weight, mean, std


@pytest.fixture(scope="module")
def model(probe, tmp_path_factory):
    """The imported bundle, opened."""
    folder = tmp_path_factory.mktemp("official")
    paths = {name: folder / f"{name}.pth" for name in ("autoencoder", "encoder", "decoder")}
    for name, path in paths.items():
        torch.save(stand_in("autoencoderkl.pth" if name == "autoencoder" else path.name), path)
    bundle = import_official(**paths, **probe[0], out=folder / "bundle")
    for path in paths.values():
        path.unlink()
    return LDAE.load(bundle, device="cpu")


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


def test_noise_and_gradient(model, given, expected):
    z, t = given["latent"], given["timestep"]
    # Samples do not see each other: half of the batch each is enough, and half the time.
    assert_same(model.predict_noise(z[:1], t[:1]), expected["unet_noise"][:1])
    assert torch.equal(expected["unet_noise"], expected["decoder_noise"])
    assert_same(model.estimate_gradient(z[1:], t[1:], given["semantic"][1:]), expected["decoder_gradient"][1:])


def test_embedding(model, given, expected):
    x = given["slices"].permute(0, 1, 3, 4, 2)  # (batch, channel, slice, x, y) -> (B, C, X, Y, Z)
    assert_same(model.embed(x), expected["y_sem"])


def test_latent_and_reconstruction(model, given, expected):
    mean, std = model.posterior(given["volume"])
    assert_same(mean, expected["latent_mean"])
    assert_same(std, expected["latent_sigma"])
    assert_same(model.decompress(0.8730 * expected["latent_mean"]), expected["reconstruction"])


def test_what_the_weights_imply_is_in_the_bundle(model, probe):
    assert model.scale.flatten().tolist() == pytest.approx([0.8730] * 3)
    assert (model.transform.orientation, model.transform.spacing, model.shape) == ("LAS", (1.5,) * 3, (128, 160, 128))
    assert type(model.transform.intensity).__name__ == "MinMax"
    assert model.denoiser.unet.strides == (1, 4, 4)
    assert isinstance(model.sampler.guidance.form, Score)
    assert (model.sampler.end, model.sampler.clip) == ("published", None)
    assert model.denoiser.schedule.alpha_bar[0] == pytest.approx(1 - 1e-4)
    _, weight, mean, std = probe
    y = np.zeros((1, DIM))
    assert model.probes["diagnosis"].classes == ("CN", "AD")
    logit = ((y - mean) / std) @ weight + 0.25  # of CN
    np.testing.assert_allclose(model.probes["diagnosis"].decision(y), -logit)
    np.testing.assert_allclose(model.direction("diagnosis").unit, -weight / np.linalg.norm(weight))


def small(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A network of published layout but little size, on the meta device, and tensors under its official names."""
    config = published_configs()[name]
    config |= {"base": 32, "groups": 8} if name in ("unet", "estimator") else {}
    with torch.device("meta"):
        module = instantiate(config)
    names = {"unet": official.unet_name, "encoder": official.encoder_name}[name]
    return module, {names(key): torch.zeros(1).expand(value.shape) for key, value in module.state_dict().items()}


def test_names_are_exactly_those_of_the_release():
    layout = json.loads((FIXTURES / "layout.json").read_text())
    wanted = {"autoencoder": "autoencoderkl.pth", "encoder": "encoder.pth", "unet": "pretrained_unet"}
    configs = published_configs()
    with torch.device("meta"):
        modules = {name: instantiate(config) for name, config in configs.items()}
    namers = {n: getattr(official, f"{n}_name") for n in ("autoencoder", "encoder", "unet", "estimator")}
    found = {name: {namers[name](key) for key in module.state_dict()} for name, module in modules.items()}
    for name, file in wanted.items():
        extra = {k for k in layout[file] if k.startswith(official.BACKBONE_TWIN) or k == official.POSITIONS}
        assert found[name] == set(layout[file]) - extra
    assert found["unet"] | found["estimator"] == set(layout["decoder.pth"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"middle_block.1.qkv.bias": None}, "'middle_block.1.qkv.bias' is missing"),
        ({"out.2.bias": torch.zeros(7)}, r"'out.2.bias' is \(7,\), not \(3,\)"),
        ({"output_blocks.9.0.x": torch.zeros(1)}, "unexpected tensor 'output_blocks.9.0.x'"),
    ],
)
def test_what_does_not_fit_is_named_as_in_the_file(change, message):
    module, tensors = small("unet")
    changed = {name: value for name, value in {**tensors, **change}.items() if value is not None}
    with pytest.raises(UserError, match=f"unet.ckpt: .*{message}"):
        official.convert_unet(module, changed, "unet.ckpt")


def test_a_training_checkpoint_holds_the_unet_under_its_prefix():
    module, tensors = small("unet")
    prefixed = {f"ema_unet.{name}": value for name, value in tensors.items()}
    found = official.convert_unet(module, {**prefixed, "unet.time_embed.0.bias": torch.ones(3)}, "unet.ckpt")
    assert found.keys() == module.state_dict().keys()


def test_copies_of_the_backbone_must_agree_and_positions_be_the_sinusoid():
    module, tensors = small("encoder")
    name = "backbone.features.0.0.bias"
    twin = official.BACKBONE_TWIN + name
    assert official.convert_encoder(module, {**tensors, twin: tensors[official.BACKBONE + name].clone()}, "encoder.pth")
    with pytest.raises(UserError, match="should be the same"):
        official.convert_encoder(module, {**tensors, twin: torch.ones(96)}, "encoder.pth")
    with pytest.raises(UserError, match="not the plain sinusoid"):
        official.convert_encoder(module, {**tensors, official.POSITIONS: torch.zeros(1, 128, 768)}, "encoder.pth")


def test_a_probe_needs_its_three_files(probe, tmp_path):
    files = dict.fromkeys(("autoencoder", "encoder", "decoder"), tmp_path / "absent.pth")
    with pytest.raises(UserError, match="all three files"):
        import_official(**files, probe=probe[0]["probe"], out=tmp_path / "b")
    with pytest.raises(UserError, match=r"absent.pth: there is no such file"):
        import_official(**files, out=tmp_path / "b")
    assert not (tmp_path / "b" / "bundle.json").exists()
