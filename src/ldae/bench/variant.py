"""One variant under test: its networks, and made-up scans and latents on disk that the real stages read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldae.bench.settings import Bench
from ldae.bench.straight import NpzLatents, NpzVolumes, WaitingTime, use_plain_kernels, use_plain_updates
from ldae.data.augmentation import Augmentation
from ldae.data.cohort import Cohort
from ldae.data.file_version import FileVersion
from ldae.data.latent_file import LATENT_FILE, digest_rows, write_latents
from ldae.data.latent_npz import npz_name, write_npz
from ldae.data.latents import write_metadata
from ldae.data.table import write_table
from ldae.data.volumes import STORED_MAXIMUM as STORED
from ldae.data.volumes import Volumes
from ldae.denoiser import Denoiser
from ldae.models.sizes import latent_sizes
from ldae.pipeline import LDAE
from ldae.runs import Workspace, estimator_node
from ldae.training.precision import DTYPES
from ldae.training.stage import Stage

HASH = "made up"  # stands for the hashes of weights, split and transform
BRAIN = (70.0, 88.0, 74.0)  # half-axes of a brain in mm: left to right, back to front, bottom to top


@dataclass(frozen=True)
class UntrainedRun:
    """Stands for a finished stage. Its networks are untrained, which cost as much as trained ones."""

    config: DictConfig
    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)

    def sha256(self, name: str) -> str:
        """Hash of the weights that the made-up latents name."""
        return HASH

    def module(self, name: str, node: DictConfig) -> nn.Module:
        """The network of a config, with random weights."""
        return instantiate(node).eval().requires_grad_(False)


@dataclass(frozen=True)
class UntrainedWorkspace(Workspace):
    """A workspace in which every predecessor is `run`."""

    run: UntrainedRun | None = None

    def predecessor(self, name: str, path: str | None = None) -> UntrainedRun:
        """`run`."""
        return self.run


@cache
def make_scan(spacing: float, shape: tuple[int, int, int]) -> np.ndarray:
    """Noise in an ellipsoid of the size of a brain, surrounded by zeros: (X, Y, Z) float32 in [0, 1].

    Args:
        spacing: voxel size in mm.
    """
    axes = [spacing * (np.arange(size) - (size - 1) / 2) / half for size, half in zip(shape, BRAIN, strict=True)]
    inside = sum(np.square(axis) for axis in np.meshgrid(*axes, indexing="ij", sparse=True)) < 1
    noise = np.random.default_rng(0).random(shape, dtype=np.float32)
    return np.where(inside, 0.2 + 0.8 * noise, np.float32(0)).astype(np.float32)


class VariantUnderTest:
    """A variant's config, and the networks, stages and data that the tasks need.

    Args:
        compose: from overrides to a config.
        overrides: those of this variant.
        folder: folder for made-up files.
    """

    def __init__(self, compose: Callable[[Sequence[str]], DictConfig], overrides: Sequence[str], folder: Path) -> None:
        self.compose = lambda *more: compose([*overrides, *more])
        self.config = self.compose()
        self.settings: Bench = instantiate(self.config.bench)
        # Accelerate allows one precision per process, but the variants differ in theirs.
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator: Accelerator = instantiate(self.config.accelerator)
        self.device = self.accelerator.device
        self.dtype = DTYPES[self.accelerator.mixed_precision]
        self.folder = folder
        self.waiting = WaitingTime()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z) of a volume, in voxels."""
        x, y, z = self.config.data.shape
        return x, y, z

    def latent_shape(self, autoencoder: nn.Module) -> tuple[int, ...]:
        """(C, X', Y', Z') of a latent."""
        return (autoencoder.latent_channels, *latent_sizes(self.shape, autoencoder.strides))

    @cached_property
    def table(self) -> pd.DataFrame:
        """The table of the made-up cohort: one scan per subject, the last subject for validation."""
        count = self.settings.scans
        split = ["train"] * (count - 1) + ["val"]
        return pd.DataFrame(
            {"subject": [f"s{i}" for i in range(count)], "session": "ses-M000", "path": "scan.nii.gz",
             "diagnosis": "", "age": "", "split": split}
        )  # fmt: skip

    @cached_property
    def scan(self) -> np.ndarray:
        """A made-up scan, (X, Y, Z) float32. It has the air of a real one, in which some kernels cost less."""
        return make_scan(float(self.config.data.spacing), self.shape)

    @cached_property
    def cohort(self) -> Cohort:
        """A cohort of copies of one volume, stored as the cache stores them; for the straight port as NPZ files."""
        folder = self.folder / "volumes"
        folder.mkdir(parents=True, exist_ok=True)
        dtype, files = self.config.data.cache_dtype, []
        top = STORED[dtype]
        for number in range(self.settings.scans):
            files.append(folder / f"{number}.{'npz' if self.settings.straight else 'npy'}")
            if files[-1].exists():
                continue
            if self.settings.straight:
                np.savez(files[-1], x=self.scan)
            else:
                np.save(files[-1], (self.scan * top).astype(dtype))
        plain = NpzVolumes(files, self.waiting, self.shape)
        versions = [FileVersion.of(file) for file in files]
        cached = Volumes(self.table["path"], files, self.shape, top, versions)
        volumes = plain if self.settings.straight else cached
        transform = SimpleNamespace(key=lambda: HASH)
        return Cohort(self.table, self.table[:0], volumes, transform, HASH, Augmentation())

    def write_latents(self, shape: Sequence[int]) -> Path:
        """Write random latents of this shape: one file, or one NPZ per scan for the straight port."""
        folder, rng, row = self.folder / "latents", np.random.default_rng(0), digest_rows(self.table)
        mean = rng.standard_normal((len(row), *shape), dtype=np.float32)
        std = np.full_like(mean, 0.1)
        names = [LATENT_FILE] * len(row)
        if self.settings.straight:
            names = [npz_name(scan.subject, scan.session) for scan in self.table.itertuples()]
            for name, m, s in zip(names, mean, std, strict=True):
                write_npz(folder / name, m, s, HASH)
        else:
            write_latents(folder / LATENT_FILE, HASH, row, self.cohort.digest_scans(), [(mean, std)])
        write_table(self.table.assign(latent_path=names), folder / "scans.csv")
        about = {"table": "scans.csv", "scale": [1.0] * shape[0], "split_hash": HASH, "autoencoder_sha256": HASH}
        write_metadata(folder, about)
        return folder

    def stage(self, name: str) -> Stage:
        """The real stage `name` on made-up data, after `prepare`."""
        config = self.compose(f"stage={name}")
        with torch.device("meta"):
            shape = self.latent_shape(instantiate(config.model.autoencoder))
        metadata = {"split_hash": HASH, "autoencoder_sha256": HASH, "scale": [1.0] * shape[0], "weights": {}}
        run = UntrainedRun(config, self.folder / name, metadata)
        if name != "aekl":
            self.write_latents(shape)
        parts: dict[str, Any] = {"workspace": UntrainedWorkspace(self.folder, run=run)}
        if get_class(config.stage._target_).reads_scans:
            parts["cohort"] = self.cohort
        torch.manual_seed(0)
        stage = instantiate(config.stage, _partial_=True)(**parts)
        settings, optim = OmegaConf.to_object(config.trainer), OmegaConf.to_object(config.optim)
        if self.settings.straight and hasattr(stage, "latents"):
            stage.latents = NpzLatents.of(stage.latents, self.waiting)
        stage.prepare(self.accelerator, settings, optim, 0)
        if self.settings.straight:
            for module in [*stage.modules.values(), *(v for v in vars(stage).values() if isinstance(v, nn.Module))]:
                use_plain_kernels(module)
            use_plain_updates(stage)
        return stage

    def model(self) -> LDAE:
        """Class LDAE with untrained networks."""
        config = self.config
        torch.manual_seed(0)
        nodes = config.model
        autoencoder, unet, encoder = (instantiate(nodes[name]) for name in ("autoencoder", "unet", "encoder"))
        estimator = instantiate(estimator_node(nodes.unet, encoder.dim, nodes.estimator))
        model = LDAE(
            autoencoder=autoencoder,
            encoder=encoder,
            denoiser=Denoiser(
                unet, estimator, instantiate(config.diffusion.schedule), instantiate(config.diffusion.parameterisation)
            ),
            scale=[1.0] * autoencoder.latent_channels,
            sampler=instantiate(config.sampler),
            shape=self.shape,
            device=self.device,
            dtype=self.dtype,
        )
        if self.settings.straight:
            for module in (autoencoder, unet, encoder, estimator):
                use_plain_kernels(module)
            model.denoiser.graphs = None
        return model
