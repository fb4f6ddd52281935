"""The three stages with tiny networks on eight made-up scans: built by their constructors, prepared for a CPU."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from ldae.config import Optim, TrainerSettings
from ldae.data.latent_file import LATENT_FILE, digest_rows, write_latents
from ldae.data.latents import write_metadata
from ldae.data.table import write_table
from ldae.diffusion.process import Velocity
from ldae.diffusion.samplers import DDIM
from ldae.diffusion.schedule import linear
from ldae.models.autoencoder import AutoencoderKL
from ldae.models.convnext import ConvNeXt
from ldae.models.semantic_encoder import SemanticEncoder
from ldae.models.unet import UNet
from ldae.runs import Workspace
from ldae.stages.aekl import AutoencoderStage
from ldae.stages.pretrain import PretrainStage
from ldae.stages.repr import ReprStage
from ldae.utils.seeding import make_generator

SHAPE = (16, 16, 16)
LATENT_SHAPE = (3, 4, 4, 4)
AUTOENCODER = {"channels": [8, 8, 8], "residual_blocks": 1, "groups": 4}
UNET = {"base": 8, "multipliers": [1, 2], "residual_blocks": 1, "attention_at": [2], "groups": 4, "dropout": 0.0}
HASH = "h"  # of the split, and of every published module
CONFIG = OmegaConf.create(
    {
        "model": {
            "autoencoder": {"_target_": "ldae.models.autoencoder.AutoencoderKL", **AUTOENCODER},
            "unet": {"_target_": "ldae.models.unet.UNet", **UNET},
        },
        "diffusion": {
            "schedule": {"_target_": "ldae.diffusion.schedule.linear"},
            "parameterisation": {"_target_": "ldae.diffusion.process.Velocity"},
        },
    }
)


class MadeUpCohort:
    """Eight scans of six subjects, in memory; four of them are for training, four for validation."""

    split_hash = HASH

    def __init__(self, subjects="aabcdeff"):
        self.x = torch.rand(8, 1, *SHAPE, generator=make_generator(0, "x"))
        take = lambda rows: self.x[torch.as_tensor(np.array(rows))]  # noqa: E731
        self.volumes = SimpleNamespace(batch=take, read_stored=take, decode=lambda x: x, shape=SHAPE)
        self.views = self.volumes
        self.table = pd.DataFrame(
            {
                "subject": list(subjects),
                "session": [f"ses-M{6 * number:03d}" for number in range(8)],
                "path": "scan.nii.gz",
                "diagnosis": "",
                "age": "",
                "split": ["train"] * 4 + ["val"] * 4,
            }
        )

    def rows(self, split):
        return np.flatnonzero((self.table["split"] == split).to_numpy())

    def accepts_split(self, split_hash):
        return split_hash == HASH

    def digest_scans(self, precision="no"):
        return digest_rows(self.table)

    def draw_augmentation(self, seed, keys):
        return {}

    draw_view_augmentation = draw_augmentation

    def augment(self, x, batch):
        return x


class FinishedRun:
    """A predecessor with random weights; the U-Net's output is not zero, as an untrained one's would be."""

    def __init__(self, name):
        self.path = Path(name)
        self.config = CONFIG
        self.metadata = {"split_hash": HASH, "autoencoder_sha256": HASH, "scale": [1.0] * 3, "weights": {}}

    def sha256(self, name):
        return HASH

    def module(self, name, node):
        module = instantiate(node)
        if name == "unet":
            nn.init.normal_(module.path.conv.weight, std=0.1)
        return module.eval().requires_grad_(False)


class FinishedWorkspace(Workspace):
    """A workspace in which every predecessor is finished."""

    def split_hash(self):
        return MadeUpCohort.split_hash

    def predecessor(self, name, path=None):
        return FinishedRun(name)


def workspace_with_latents(folder: Path, cohort: MadeUpCohort) -> FinishedWorkspace:
    """A workspace whose predecessors are finished, with random latents of the cohort below `folder`."""
    workspace = FinishedWorkspace(folder)
    latents = workspace.latents
    latents.mkdir()
    mean = torch.randn(8, *LATENT_SHAPE, generator=make_generator(1, "latent")).numpy()
    rows = digest_rows(cohort.table)
    write_latents(latents / LATENT_FILE, HASH, rows, rows, [(mean, np.full_like(mean, 0.1))])
    write_table(cohort.table.assign(latent_path=str(latents / LATENT_FILE)), latents / "scans.csv")
    metadata = {"table": "scans.csv", "scale": [1.0] * 3, "split_hash": HASH, "autoencoder_sha256": HASH}
    write_metadata(latents, metadata)
    return workspace


def aekl_stage() -> AutoencoderStage:
    """Stage 1, whose discriminator is switched on at step 1."""
    from monai.networks.nets import PatchDiscriminator

    torch.manual_seed(0)
    return AutoencoderStage(
        autoencoder=AutoencoderKL(channels=(8, 8), residual_blocks=1, groups=4),
        discriminator=PatchDiscriminator(spatial_dims=3, in_channels=1, channels=4, num_layers_d=1),
        perceptual=None, kl_weight=1e-7, ssim_weight=0.1, perceptual_weight=1e-3, adversarial_weight=0.025,
        adversarial_start=1, initial_weights=None, cohort=MadeUpCohort(), workspace=None,
    )  # fmt: skip


def pretrain_stage(folder: Path) -> PretrainStage:
    """Stage 2; its latents are written below `folder`."""
    workspace = workspace_with_latents(folder, MadeUpCohort())
    torch.manual_seed(0)
    return PretrainStage(
        unet=UNet(**UNET), schedule=linear(), parameterisation=Velocity(), latents=None, initial_weights=None,
        workspace=workspace,
    )  # fmt: skip


def repr_stage(folder: Path, time_power: float = 1.0, **encoder) -> ReprStage:
    """Stage 3 on a random U-Net and autoencoder; its latents are written below `folder`."""
    cohort = MadeUpCohort()
    torch.manual_seed(0)
    backbone = ConvNeXt(widths=(8, 16), depths=(1, 1), kernel=3, layer_scale=1.0, init_std=None)
    return ReprStage(
        encoder=SemanticEncoder(backbone, slices=16, dim=32, heads=4, **encoder),
        estimator=OmegaConf.create({"modes": 2, "start_from_unet": True}), sampler=DDIM(steps=2),
        time_power=time_power, other_visit=0.0, initial_weights=None, aekl=None, pretrain=None, latents=None,
        cohort=cohort, workspace=workspace_with_latents(folder, cohort),
    )  # fmt: skip


def prepared(stage, **settings):
    """The stage, prepared for training on a CPU."""
    stage.prepare(Accelerator(cpu=True), TrainerSettings(**{"ema": 0.5, **settings}), Optim(lr=1e-3), 0)
    return stage


def batch(stage, indices):
    """The micro-batch of these training samples."""
    indices = np.array(indices)
    return {"index": indices, "position": indices, **stage.fetch(indices, indices, 0)}
