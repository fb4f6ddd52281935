"""Stage 2: an unconditional diffusion model learns the latents (arXiv 2006.11239 on the latents of arXiv 2112.10752).

All latents of the split live in memory as posterior mean and std; their noise is drawn anew at every step.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldae.config import Optim, TrainerSettings
from ldae.data.cohort import Cohort
from ldae.data.latents import LatentSet
from ldae.data.stream import Batch
from ldae.data.subsampling import subsample_by_subject
from ldae.data.table import scan_names
from ldae.diffusion.process import Parameterisation, add_noise
from ldae.diffusion.schedule import Schedule
from ldae.losses.denoising import denoising_loss
from ldae.models.state import load_weights
from ldae.runs import Workspace
from ldae.training.device import batch_to_device, module_to_memory_format, to_memory_format, uses_channels_last
from ldae.training.ema import Ema
from ldae.training.optimizer_step import StepResult, Updater, build_adam
from ldae.training.stage import Monitor, Stage
from ldae.training.train_loss import TRAIN_LOSS
from ldae.training.validation import mean_over_scans, shard_rows
from ldae.utils.errors import UserError
from ldae.utils.seeding import draw_normal, draw_timesteps


def open_latents(path: str | None, cohort: Cohort, workspace: Workspace) -> LatentSet:
    """The latents of this workspace, which must belong to its autoencoder and to this split."""
    folder = Path(path) if path else workspace.latents
    latents = LatentSet.open(folder)
    if latents.split_hash != cohort.split_hash:
        raise UserError(f"{folder} was made for another split of the subjects: run encode_latents.py again")
    if path is None and latents.autoencoder != workspace.predecessor("aekl").sha256("autoencoder"):
        raise UserError(f"{folder} was made by another autoencoder than {workspace.root / 'aekl'}: encode again")
    return latents


class PretrainStage(Stage):
    """Trains the U-Net; its average at the last step is published.

    Args:
        initial_weights: local file of a U-Net to start from, loaded strictly.
    """

    name = "pretrain"
    harmless_on_resume = ("latents", "initial_weights")
    monitor = Monitor(TRAIN_LOSS, higher_is_better=False)
    publishes_last = True
    published = ("unet",)

    def __init__(
        self,
        unet: nn.Module,
        schedule: Schedule,
        parameterisation: Parameterisation,
        latents: str | None,
        initial_weights: str | None,
        cohort: Cohort,
        workspace: Workspace,
    ) -> None:
        if initial_weights is not None:
            load_weights(unet, initial_weights)
        self.modules = {"unet": unet}
        self.schedule = schedule
        self.parameterisation = parameterisation
        self.latents = open_latents(latents, cohort, workspace)
        self.train_rows = self.latents.rows("train")
        self.num_samples = len(self.train_rows)
        self.sample_names = scan_names(self.latents.table, self.train_rows)

    def prepare(self, accelerator: Accelerator, trainer: TrainerSettings, optim: Optim, seed: int) -> None:
        """See Stage."""
        self.accelerator = accelerator
        self.seed = seed
        subjects = self.latents.table["subject"].tolist()
        self.validation_rows = subsample_by_subject(self.latents.rows("val"), subjects, trainer.validation_scans, seed)
        self.latents = self.latents.to(accelerator.device)
        self.schedule.to(accelerator.device)
        self.channels_last = uses_channels_last(trainer, accelerator)
        unet = module_to_memory_format(self.modules["unet"], self.channels_last)
        unet.checkpointing = trainer.checkpointing
        if unet.prior is not None:
            unet.prior.fit(*self.latents.moments(self.train_rows), self.schedule)
        self.optimizers = {"unet": build_adam(unet.parameters(), optim.lr, optim)}
        self.unet = accelerator.prepare(torch.compile(unet) if trainer.compile else unet)
        self.update = Updater(accelerator, self.unet, self.optimizers["unet"], trainer.clip)
        self.averages = {"unet": Ema(unet, trainer.ema, trainer.ema_warmup)} if trainer.ema else {}
        unet.train()

    def fetch(self, index: np.ndarray, position: np.ndarray, number: int) -> Batch:
        """Rows of the latents, and what is drawn for them."""
        return self._drawn(self.train_rows[index], position, "train")

    def _drawn(self, rows: np.ndarray, keys: Sequence[int], purpose: str) -> Batch:
        """`rows` with the posterior's noise, the noise and t (B,), each keyed by its sample's key."""
        shape = self.latents.mean.shape[1:]
        return {
            "row": torch.from_numpy(np.asarray(rows)),
            "posterior": draw_normal(shape, self.seed, keys, f"{purpose}/posterior"),
            "noise": draw_normal(shape, self.seed, keys, f"{purpose}/noise"),
            "t": draw_timesteps(self.schedule.timesteps, self.seed, keys, f"{purpose}/t"),
        }

    def _noised(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """z_t, z_0 and the noise, (B, C, X, Y, Z) each, and t (B,), of a batch on the device."""
        z0 = self.latents.sample(batch["row"], batch["posterior"])
        z0, noise = (to_memory_format(value, self.channels_last) for value in (z0, batch["noise"]))
        return add_noise(self.schedule, z0, noise, batch["t"]), z0, noise, batch["t"]

    def _loss(self, batch: Batch) -> dict[str, Tensor]:
        z_t, z0, noise, t = self._noised(batch_to_device(batch, self.accelerator.device))
        output = self.unet(z_t, t)
        return {"loss": denoising_loss(self.parameterisation, self.schedule, output, z0, noise, t)}

    def run_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """One update of the U-Net, one of its average."""
        return self.take_step(step, (self.update, self.update.accumulate(micro_batches, self._loss)))

    def validate(self) -> dict[str, float]:
        """The loss on validation scans at fixed noise, four timesteps each, one a quarter of the schedule."""
        found: dict[int, dict[str, Tensor]] = {}
        quarter = self.schedule.timesteps // 4
        for row in shard_rows(self.validation_rows, self.accelerator):
            batch = self._drawn(np.full(4, row), [int(row) * 4 + k for k in range(4)], "validation")
            batch["t"] = batch["t"] // 4 + quarter * torch.arange(4)
            z_t, z0, noise, t = self._noised(batch_to_device(batch, self.accelerator.device))
            with self.accelerator.autocast():
                output = self.modules["unet"](z_t, t)
            found[int(row)] = {"loss": denoising_loss(self.parameterisation, self.schedule, output, z0, noise, t)}
        return mean_over_scans(found, self.accelerator)

    def metadata(self) -> dict[str, Any]:
        """The latents it learned."""
        return {"autoencoder_sha256": self.latents.autoencoder, "scale": self.latents.scale.tolist()}
