"""A run of a model so small that every method takes milliseconds, with random weights and a probe."""

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
    """Away from the zeros that untrained networks end in; a large factor of z_t would make the path stiff."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.02 if "narrowing" in name else 0.3)
    return module.eval()


def small_run(root: Path, likeness: OodCheck | None = None, about: dict | None = None) -> Path:
    """A run at `root`, as three stages and evaluate.py leave it: 8 voxels a side of 9 mm, y of 16 numbers.

    `about`: what encode_latents.py found besides.
    """
    found = {"likeness": likeness.to_dict() if likeness else None, **(about or {})}
    config = compose_config("train", SMALL)
    with open_dict(config):
        config.hydra = None
    space = Workspace(root)
    torch.manual_seed(0)
    nodes = {**config.model, "estimator": estimator_node(config.model.unet, 16, config.model.estimator)}
    networks = {
        name: random_weights(instantiate(nodes[name])) for name in ("autoencoder", "unet", "encoder", "estimator")
    }
    about = {"split_hash": "0", "scale": [1.5, 2.0, 0.5], "step": 1}
    published = {"aekl": ["autoencoder"], "pretrain": ["unet"], "repr": ["encoder", "estimator"]}
    for stage, names in published.items():
        at = space.stage(stage)
        if stage == "pretrain":
            about["autoencoder_sha256"] = space.stage("aekl").sha256("autoencoder")
        about["stands_on"] = (
            {s: space.stage(s).metadata["weights"] for s in ("aekl", "pretrain")} if stage == "repr" else {}
        )
        at.publish({name: networks[name].state_dict() for name in names}, about)
        at.write_config(config)
    rng = np.random.default_rng(0)
    probe = LinearModel("diagnosis", *rng.uniform(0.5, 1, (3, 16)), intercept=0.1, classes=("CN", "AD"))
    weights = Bundle.from_run(space.root).weights_hash
    write_frozen_probes(space.evaluation / "probes.json", {"diagnosis": {EMBEDDING: FrozenProbe([], probe)}}, weights)
    write_metadata(space.latents, found | {"autoencoder_sha256": space.stage("aekl").sha256("autoencoder")})
    return space.root
