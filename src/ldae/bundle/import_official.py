"""Conversion of the released LDAE checkpoints into a bundle, with the settings that the weights imply.

Latents are scaled by 0.8730. Scans have voxels of 1.5 mm, min-max intensities in [0, 1] and LAS orientation (that of
FSL's MNI grid). The U-Net downsamples by (1, 2, 2). Sampling is DDIM on a linear schedule, with the score form of the
guidance and the published rule for the end of the grid. Unlike in the released sampler, the predicted z_0 is not
clamped to [-1, 1] (sampler.clip=1.0 does that), because clamping prevents inversion.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from ldae.bundle import official_weights as official
from ldae.bundle.bundle import Bundle, StoredNetwork
from ldae.bundle.description import PROBES
from ldae.config import compose_config
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


Files = Mapping[str, Path | str | None]  # by network; the U-Net's is optional


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
    """Write the released checkpoints as the bundle `out`, which `LDAE.load(out)` opens, and return its folder.

    Args:
        autoencoder, encoder, decoder: autoencoderkl.pth, encoder.pth, decoder.pth.
        probe, mean, std: the linear AD/CN probe, and mean and standard deviation of the y that it was fitted on: .pth,
            .pt, .npy, .json or .safetensors. Its positive class is CN; in the bundle it is AD.
        unet: a training checkpoint with the U-Net as `ema_unet.`; it must be the U-Net inside `decoder`.

    Raises:
        UserError: a file is missing or unreadable, or has a missing, unexpected or misshapen tensor, which is named.
    """
    if (probe is None, mean is None, std is None) not in {(True,) * 3, (False,) * 3}:
        raise UserError("a probe needs all three files: --probe, --mean and --std")
    folder, configs = Path(out), published_configs()
    files = {"autoencoder": autoencoder, "encoder": encoder, "decoder": decoder, "unet": unet}
    readout = None if probe is None else _read_probe(Path(probe), Path(mean), Path(std), configs["encoder"]["dim"])
    bundle = Bundle(
        networks=_write_networks(folder, configs, files),
        scale=[SCALE] * configs["autoencoder"]["latent_channels"],
        transform=TRANSFORM,
        probes=None if readout is None else folder / PROBES,
        sources={name: Path(path).name for name, path in files.items() if path is not None},
        **_published_diffusion(),
    )
    if readout is not None:
        write_frozen_probes(folder / PROBES, {"diagnosis": {EMBEDDING: FrozenProbe([], readout)}}, bundle.weights_hash)
    return bundle.save(folder)


def _write_networks(folder: Path, configs: Mapping[str, dict[str, Any]], files: Files) -> dict[str, StoredNetwork]:
    with torch.device("meta"):
        modules = {name: instantiate(config) for name, config in configs.items()}
    networks = {}
    for name, tensors in _convert_networks(modules, files):
        path = folder / f"{name}.safetensors"
        save_tensors(path, tensors)
        networks[name] = StoredNetwork(configs[name], path, file_sha256(path))
        log.info("%s: %d tensors, %.1f M values", name, len(tensors), sum(t.numel() for t in tensors.values()) / 1e6)
    return networks


def published_configs() -> dict[str, dict[str, Any]]:
    """Configs of the four networks of conf/model/published.yaml, by name."""
    shape = ",".join(map(str, SHAPE))
    view = (f"+data.view.shape=[{shape}]", "+data.view.channels=1")  # the released encoder sees T1 intensities
    model = _compose("model/published", f"+data.shape=[{shape}]", *view).model
    configs = {name: to_container(model[name]) for name in ("autoencoder", "encoder", "unet")}
    return {**configs, "estimator": to_container(estimator_node(model.unet, model.encoder.dim))}


def _published_diffusion() -> dict[str, dict[str, Any]]:
    diffusion, sampler = _compose("diffusion/linear").diffusion, _compose("sampler/published").sampler
    return {
        "schedule": to_container(diffusion.schedule),
        "parameterisation": to_container(diffusion.parameterisation),
        "sampler": to_container(sampler),
    }


def _compose(name: str, *overrides: str) -> DictConfig:
    """Compose a config of conf/, also inside a Hydra application, which has initialised Hydra already."""
    if GlobalHydra.instance().is_initialized():
        return compose(name, list(overrides))
    return compose_config(name, overrides)


def _convert_networks(modules: Mapping[str, nn.Module], files: Files) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield (name, tensors) of each network, one at a time because the decoder alone has 3.5 GB."""
    path = files["autoencoder"]
    yield "autoencoder", official.convert_autoencoder(modules["autoencoder"], read_tensors(path), path)
    path = files["encoder"]
    yield "encoder", official.convert_encoder(modules["encoder"], read_tensors(path), path)
    path = files["decoder"]
    trunk, estimator = official.convert_decoder(modules["unet"], modules["estimator"], read_tensors(path), path)
    if files["unet"] is not None:
        unet = official.convert_unet(modules["unet"], read_tensors(files["unet"]), files["unet"])
        _check_same_unet(unet, trunk, files)
    yield "unet", trunk
    yield "estimator", estimator


def _check_same_unet(unet: dict[str, Tensor], trunk: dict[str, Tensor], files: Files) -> None:
    """Refuse a U-Net other than the one that the estimator was trained with, which is in the decoder's file."""
    for name, tensor in unet.items():
        if not torch.allclose(tensor, trunk[name], rtol=1e-3, atol=1e-5):
            raise UserError(
                f"{files['unet']}: '{official.official_unet_name(name)}' is not what {files['decoder']} holds: "
                "the decoder was trained on another U-Net"
            )


def _read_probe(path: Path, mean: Path, std: Path, dim: int) -> LinearModel:
    """The AD/CN probe with its sign changed, so that its positive class is AD."""
    weight, bias = _read_linear_layer(path, dim)
    return LinearModel(
        column="diagnosis",
        mean=_read_vector(mean, dim),
        std=_read_vector(std, dim),
        coef=-weight,
        intercept=-bias,
        classes=("CN", "AD"),
    )


def _read_linear_layer(path: Path, dim: int) -> tuple[np.ndarray, float]:
    """Weight (dim,) and bias."""
    arrays = _read_arrays(path)
    weights = [array for array in arrays if array.size == dim]
    biases = [array for array in arrays if array.size == 1]
    if len(weights) != 1 or len(weights) + len(biases) != len(arrays) or len(biases) > 1:
        shapes = ", ".join(str(array.shape) for array in arrays)
        raise UserError(f"{path}: one weight of {dim} values and at most one bias are needed, found {shapes}")
    return weights[0].reshape(-1), float(biases[0].reshape(())) if biases else 0.0


def _read_vector(path: Path, dim: int) -> np.ndarray:
    arrays = _read_arrays(path)
    if len(arrays) != 1 or arrays[0].size != dim or not np.isfinite(arrays[0]).all():
        raise UserError(f"{path}: one array of {dim} finite values is needed")
    return arrays[0].reshape(-1)


def _read_arrays(path: Path) -> list[np.ndarray]:
    """All arrays of a .npy, .json, .safetensors or PyTorch file, as float64."""
    if path.suffix in (".npy", ".json") and path.is_file():
        try:
            value = np.load(path, allow_pickle=False) if path.suffix == ".npy" else json.loads(path.read_text())
            return [np.asarray(value, np.float64)]
        except (ValueError, TypeError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
    return [tensor.double().numpy() for tensor in read_tensors(path, bare=True).values()]
