"""Stage 2: an unconditional diffusion model of the latents (DDPM, arXiv 2006.11239, in the latent space of 2112.10752).

    z_t = sqrt(A_t) z_0 + sqrt(1 - A_t) eps        minimise |eps - eps_theta(z_t, t)|^2, or the same for v

All latents are in memory as the mean and standard deviation of their posterior. In every step, z_0 is a new sample of
the posterior, with new noise eps and a new t.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldae.config import Optim, TrainerSettings
from ldae.data.stream import Batch
from ldae.data.subsampling import subsample_by_subject
from ldae.data.table import scan_names
from ldae.diffusion.process import Parameterisation, add_noise
from ldae.diffusion.schedule import Schedule
from ldae.losses.denoising import denoising_loss
from ldae.models.placement import place_module, to_memory_format
from ldae.models.state import load_weights
from ldae.models.unet import UNet
from ldae.runs import Workspace
from ldae.stages.predecessors import open_latents
from ldae.training.device import batch_to_device, uses_channels_last
from ldae.training.ema import Ema
from ldae.training.optimizer_step import StepResult, Updater, build_adam
from ldae.training.stage import Monitor, Stage
from ldae.training.step_graph import can_record
from ldae.training.train_loss import TRAIN_LOSS
from ldae.training.validation import mean_over_scans, shard_rows
from ldae.utils.seeding import draw_normal, draw_timesteps


class PretrainStage(Stage):
    """Trains the U-Net and publishes its moving average at the last step.

    Args:
        unet: the U-Net.
        schedule: noise schedule, A_t.
        parameterisation: what the U-Net predicts, eps or v.
        latents: folder that encode_latents.py wrote; None: that of the workspace.
        initial_weights: file with the weights of a U-Net to start from, loaded strictly.
        workspace: where the latents and the autoencoder that made them are.
    """

    name = "pretrain"
    reads_scans = False
    harmless_on_resume = ("latents", "initial_weights")
    monitor = Monitor(TRAIN_LOSS, higher_is_better=False)
    publishes_last = True
    published = ("unet",)

    def __init__(
        self,
        unet: UNet,
        schedule: Schedule,
        parameterisation: Parameterisation,
        latents: str | None,
        initial_weights: str | None,
        workspace: Workspace,
    ) -> None:
        if initial_weights is not None:
            load_weights(unet, initial_weights)
        self.modules = {"unet": unet}
        self.schedule = schedule
        self.parameterisation = parameterisation
        self.latents = open_latents(latents, workspace.split_hash(), workspace)
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
        unet = place_module(self.modules["unet"], accelerator.device, self.channels_last)
        unet.checkpointing = trainer.checkpointing
        if unet.prior is not None:
            unet.prior.fit(*self.latents.moments(self.train_rows), self.schedule)
        self.optimizers = {"unet": build_adam(unet.parameters(), optim.lr, optim)}
        self.unet = accelerator.prepare(torch.compile(unet) if trainer.compile else unet)
        record = can_record(trainer, accelerator)
        self.update = Updater(accelerator, self.unet, self.optimizers["unet"], trainer.clip, record)
        self.averages = {"unet": Ema(unet, trainer.ema, trainer.ema_warmup)} if trainer.ema else {}
        unet.train()

    def fetch(self, index: np.ndarray, position: np.ndarray, number: int) -> Batch:
        """Rows of the latents, and the random draws for them."""
        return self._draw(self.train_rows[index], position, "train")

    def _draw(self, rows: np.ndarray, keys: Sequence[int], purpose: str) -> Batch:
        """A micro-batch of latents: their rows and what is drawn for each of them by its key, on the CPU."""
        shape = self.latents.mean.shape[1:]
        return {
            "row": torch.from_numpy(np.asarray(rows)),  # (B,)
            "posterior": draw_normal(shape, self.seed, keys, f"{purpose}/posterior"),  # (B, C, X, Y, Z)
            "noise": draw_normal(shape, self.seed, keys, f"{purpose}/noise"),  # (B, C, X, Y, Z)
            "t": draw_timesteps(self.schedule.timesteps, self.seed, keys, f"{purpose}/t"),  # (B,)
        }

    def run_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """Update the U-Net and its moving average."""
        gradients = self.update.accumulate(micro_batches, lambda batch: {"loss": self._loss(self.unet, batch)})
        return self.take_step(step, (self.update, gradients))

    def _loss(self, unet: nn.Module, batch: Batch) -> Tensor:
        """|eps - eps_theta(z_t, t)|^2, or the same for v, mean over the micro-batch."""
        batch = batch_to_device(batch, self.accelerator.device)
        z0 = self.latents.sample(batch["row"], batch["posterior"])  # (B, C, X, Y, Z), unit variance
        z0, noise = (to_memory_format(value, self.channels_last) for value in (z0, batch["noise"]))
        z_t = add_noise(self.schedule, z0, noise, batch["t"])  # sqrt(A_t) z_0 + sqrt(1 - A_t) eps
        with self.accelerator.autocast():
            output = unet(z_t, batch["t"])  # eps_theta or v_theta, (B, C, X, Y, Z)
        return denoising_loss(self.parameterisation, self.schedule, output, z0, noise, batch["t"])

    def validate(self) -> dict[str, float]:
        """Loss on the validation scans with fixed noise, each at four timesteps, one in every quarter of T."""
        losses: dict[int, dict[str, Tensor]] = {}
        quarter = self.schedule.timesteps // 4
        for row in shard_rows(self.validation_rows, self.accelerator):
            batch = self._draw(np.full(4, row), [int(row) * 4 + k for k in range(4)], "validation")
            batch["t"] = batch["t"] // 4 + quarter * torch.arange(4)
            losses[int(row)] = {"loss": self._loss(self.modules["unet"], batch)}
        return mean_over_scans(losses, self.accelerator)

    def metadata(self) -> dict[str, Any]:
        """The autoencoder that made the latents, and their scale."""
        return {"autoencoder_sha256": self.latents.autoencoder, "scale": self.latents.scale.tolist()}
