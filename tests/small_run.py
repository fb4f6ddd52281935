"""A run with random weights and a probe, so small that every method takes milliseconds."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import open_dict
from torch import nn

from ldae.bundle.bundle import Bundle
from ldae.config import compose_config
from ldae.data.latents import write_metadata
from ldae.editing.frozen_probes import EMBEDDING, FrozenProbe, write_frozen_probes
from ldae.editing.linear_model import LinearModel
from ldae.runs import Workspace, estimator_node
from ldae.scans.ood_check import OodCheck

SMALL = [
    "experiment=smoke", "stage=repr", "model/encoder=small", "data.shape=[8,8,8]", "model.autoencoder.channels=[8,8]",
    "model.autoencoder.latent_channels=3", "model.estimator.modes=1",
    "model.autoencoder.groups=4", "model.unet.base=8", "model.unet.groups=4", "model.encoder.dim=16",
    "model.encoder.backbone.widths=[8,16]", "model.encoder.backbone.depths=[1,1]", "sampler.steps=4",
]  # fmt: skip


def random_weights(module: nn.Module) -> nn.Module:
    """Fill a network with noise: untrained ones end in zeros. The input's gain stays small, or the path gets stiff."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.02 if "narrowing" in name else 0.3)
    return module.eval()


def small_run(
    root: Path,
    ood_check: OodCheck | None = None,
    metadata: dict | None = None,
    settings: Sequence[str] = SMALL,
) -> Path:
    """Write what the three stages and evaluate.py leave, for volumes of 8 voxels of 9 mm a side and y of 16 numbers.

    Args:
        ood_check: the out-of-distribution check of the training scans.
        metadata: further entries of latents.json.
        settings: overrides of conf/train.yaml.
    """
    config = compose_config("train", list(settings))
    with open_dict(config):
        config.hydra = None
    space = Workspace(root)
    torch.manual_seed(0)
    nodes = {**config.model, "estimator": estimator_node(config.model.unet, 16, config.model.estimator)}
    names = ("autoencoder", "unet", "encoder", "estimator")
    networks = {name: random_weights(instantiate(nodes[name])) for name in names}
    scale = [1.5, 2.0, 0.5][: config.model.autoencoder.latent_channels]
    weights = {"split_hash": "0", "scale": scale, "step": 1}

    def publish(stage: str, *names: str) -> None:
        run = space.stage(stage)
        run.publish({name: networks[name].state_dict() for name in names}, weights)
        run.write_config(config)

    publish("aekl", "autoencoder")
    autoencoder = {"autoencoder_sha256": space.stage("aekl").sha256("autoencoder")}
    weights |= autoencoder
    publish("pretrain", "unet")
    weights["stands_on"] = {stage: space.stage(stage).metadata["weights"] for stage in ("aekl", "pretrain")}
    publish("repr", "encoder", "estimator")
    stored_check = ood_check.to_dict() if ood_check else None
    write_metadata(space.latents, {"likeness": stored_check, **(metadata or {}), **autoencoder})
    _write_probe(space)
    return space.root


def _write_probe(space: Workspace) -> None:
    rng = np.random.default_rng(0)
    probe = LinearModel("diagnosis", *rng.uniform(0.5, 1, (3, 16)), intercept=0.1, classes=("CN", "AD"))
    probes = {"diagnosis": {EMBEDDING: FrozenProbe([], probe)}}
    write_frozen_probes(space.evaluation / "probes.json", probes, Bundle.from_run(space.root).weights_hash)
