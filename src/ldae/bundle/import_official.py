"""The released LDAE checkpoints as a bundle, with everything that they imply and do not say.

Latents are scaled by 0.8730; scans are 1.5 mm, min-max to [0, 1], and in the orientation of FSL's MNI grid, LAS; the
U-Net halves (1, 2, 2); sampling is DDIM with the score form and the published end rule on a linear schedule. The
predicted z_0 is not clamped as the released sampler does it (sampler.clip=1.0): that breaks inversion.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from torch import Tensor, nn

from ldae.bundle import official_weights as official
from ldae.bundle.bundle import Bundle, StoredNetwork
from ldae.bundle.description import PROBES
from ldae.config import conf_dir
from ldae.editing.frozen_probes import EMBEDDING, FrozenProbe, write_frozen_probes
from ldae.editing.linear_model import LinearModel
from ldae.models.state import read_tensors
from ldae.runs import estimator_node, save_tensors, to_container
from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256

log = logging.getLogger(__name__)

SCALE = 0.8730
SHAPE = (128, 160, 128)
TRANSFORM = {
    "_target_": "ldae.data.transforms.Transform",
    "shape": list(SHAPE),
    "spacing": 1.5,
    "intensity": {"_target_": "ldae.data.transforms.MinMax"},
    "orientation": "LAS",
}


def import_official(
    autoencoder: Path | str,
    encoder: Path | str,
    decoder: Path | str,
    probe: Path | str | None = None,
    mean: Path | str | None = None,
    std: Path | str | None = None,
    unet: Path | str | None = None,
    out: Path | str = "official",
) -> Path:
    """Write the bundle `out` of the released checkpoints; `LDAE.load(out)` opens it.

    Args:
        autoencoder, encoder, decoder: autoencoderkl.pth, encoder.pth, decoder.pth.
        probe, mean, std: the linear AD/CN probe, mean and standard deviation of the y it was fitted on: .pth, .pt,
            .npy or .safetensors. Its positive direction is CN; ours is AD.
        unet: a training checkpoint that holds the U-Net as `ema_unet.`; it must be the one inside `decoder`.

    Raises:
        UserError: a file is missing or unreadable, or its first missing, unexpected or misshapen tensor by name.
    """
    if (probe is None, mean is None, std is None) not in {(True,) * 3, (False,) * 3}:
        raise UserError("a probe needs all three files: --probe, --mean and --std")
    folder, configs = Path(out), published_configs()
    files = {"autoencoder": autoencoder, "encoder": encoder, "decoder": decoder, "unet": unet}
    probed = None if probe is None else _probe(Path(probe), Path(mean), Path(std), configs["encoder"]["dim"])
    with torch.device("meta"):
        modules = {name: instantiate(config) for name, config in configs.items()}
    parts = {}
    for name, tensors in _converted(modules, files):
        path = folder / f"{name}.safetensors"
        save_tensors(path, tensors)
        parts[name] = StoredNetwork(configs[name], path, file_sha256(path))
        log.info("%s: %d tensors, %.1f M values", name, len(tensors), sum(t.numel() for t in tensors.values()) / 1e6)
    settings = _settings()
    bundle = Bundle(
        networks=parts,
        scale=[SCALE] * modules["autoencoder"].latent_channels,
        transform=TRANSFORM,
        probes=None if probed is None else folder / PROBES,
        sources={name: Path(path).name for name, path in files.items() if path is not None},
        **settings,
    )
    if probed is not None:
        write_frozen_probes(folder / PROBES, {"diagnosis": {EMBEDDING: FrozenProbe([], probed)}}, bundle.weights_hash)
    return bundle.save(folder)


def published_configs() -> dict[str, dict[str, Any]]:
    """The four networks of conf/model/published.yaml."""
    model = _composed("model/published", f"+data.shape={list(SHAPE)}".replace(" ", "")).model
    configs = {name: to_container(model[name]) for name in ("autoencoder", "encoder", "unet")}
    return {**configs, "estimator": to_container(estimator_node(model.unet, model.encoder.dim))}


def _settings() -> dict[str, Any]:
    diffusion, sampler = _composed("diffusion/linear").diffusion, _composed("sampler/published").sampler
    return {
        "schedule": to_container(diffusion.schedule),
        "parameterisation": to_container(diffusion.parameterisation),
        "sampler": to_container(sampler),
    }


def _composed(name: str, *overrides: str) -> Any:
    if GlobalHydra.instance().is_initialized():
        return compose(name, list(overrides))
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(name, list(overrides))


def _converted(modules: dict[str, nn.Module], files: dict[str, Any]) -> Any:
    """(name, tensors) of each network, one at a time: the decoder alone holds 3.5 GB."""
    path = files["autoencoder"]
    yield "autoencoder", official.convert_autoencoder(modules["autoencoder"], read_tensors(path), path)
    path = files["encoder"]
    yield "encoder", official.convert_encoder(modules["encoder"], read_tensors(path), path)
    path = files["decoder"]
    trunk, estimator = official.convert_decoder(modules["unet"], modules["estimator"], read_tensors(path), path)
    if files["unet"] is not None:
        _same(official.convert_unet(modules["unet"], read_tensors(files["unet"]), files["unet"]), trunk, files)
    yield "unet", trunk
    yield "estimator", estimator


def _same(given: dict[str, Tensor], trunk: dict[str, Tensor], files: dict[str, Any]) -> None:
    """The estimator was trained on one U-Net, the one in its own file."""
    for name, tensor in given.items():
        if not torch.allclose(tensor, trunk[name], rtol=1e-3, atol=1e-5):
            raise UserError(
                f"{files['unet']}: '{official.official_unet_name(name)}' is not what {files['decoder']} holds: "
                "the decoder was trained on another U-Net"
            )


def _probe(path: Path, mean: Path, std: Path, dim: int) -> LinearModel:
    """The probe turned round: positive is AD."""
    weight, bias = _linear(path, dim)
    return LinearModel(
        column="diagnosis",
        mean=_vector(mean, dim),
        std=_vector(std, dim),
        coef=-weight,
        intercept=-bias,
        classes=("CN", "AD"),
    )


def _linear(path: Path, dim: int) -> tuple[np.ndarray, float]:
    found = _arrays(path)
    weights = [array for array in found if array.size == dim]
    biases = [array for array in found if array.size == 1]
    if len(weights) != 1 or len(weights) + len(biases) != len(found) or len(biases) > 1:
        shapes = ", ".join(str(array.shape) for array in found)
        raise UserError(f"{path}: one weight of {dim} values and at most one bias are needed, found {shapes}")
    return weights[0].reshape(-1), float(biases[0].reshape(())) if biases else 0.0


def _vector(path: Path, dim: int) -> np.ndarray:
    found = _arrays(path)
    if len(found) != 1 or found[0].size != dim or not np.isfinite(found[0]).all():
        raise UserError(f"{path}: one array of {dim} finite values is needed")
    return found[0].reshape(-1)


def _arrays(path: Path) -> list[np.ndarray]:
    """Every array of a .npy, .json, .safetensors or PyTorch file, as float64."""
    if path.suffix in (".npy", ".json") and path.is_file():
        try:
            value = np.load(path, allow_pickle=False) if path.suffix == ".npy" else json.loads(path.read_text())
            return [np.asarray(value, np.float64)]
        except (ValueError, TypeError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
    return [tensor.double().numpy() for tensor in read_tensors(path, bare=True).values()]
