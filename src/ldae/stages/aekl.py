"""Stage 1: a scan is compressed by an AutoencoderKL, trained against a patch discriminator.

L1 + kl_weight * KL + perceptual_weight * perceptual + adversarial_weight * LSGAN (arXiv 2504.08635, section on
compression; arXiv 2112.10752, equation 25), and where it is asked for + ssim_weight * (1 - SSIM).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ldae.config import Optim, TrainerSettings
from ldae.data.cohort import Cohort
from ldae.data.stream import Batch
from ldae.data.subsampling import subsample_by_subject
from ldae.data.table import scan_names
from ldae.evaluation.images.image_metrics import BrainMasks, ssim_whole_and_masked
from ldae.losses import autoencoder as losses
from ldae.losses.structural import structural_dissimilarity
from ldae.models.sizes import latent_sizes
from ldae.models.state import load_weights
from ldae.runs import Workspace
from ldae.training.device import batch_to_device, module_to_memory_format, to_memory_format, uses_channels_last
from ldae.training.optimizer_step import StepResult, Updater, build_adam
from ldae.training.stage import Monitor, Stage
from ldae.training.validation import mean_over_scans, shard_rows
from ldae.utils.errors import UserError
from ldae.utils.seeding import draw_normal, make_generator

REFERENCE_SCANS = 96


class AutoencoderStage(Stage):
    """Trains the autoencoder and the discriminator with two optimisers; the best by validation L1 is published.

    Args:
        adversarial_start: optimiser step at which the discriminator is switched on.
        adversarial_weight: factor of both the generator's and the discriminator's adversarial loss, as published.
        initial_weights: local file of an AutoencoderKL to start from, loaded strictly.
    """

    name = "aekl"
    harmless_on_resume = ("initial_weights",)
    monitor = Monitor("l1", higher_is_better=False)
    published = ("autoencoder",)

    def __init__(
        self,
        autoencoder: nn.Module,
        discriminator: nn.Module,
        perceptual: Callable[..., Tensor] | None,
        kl_weight: float,
        ssim_weight: float,
        perceptual_weight: float,
        adversarial_weight: float,
        adversarial_start: int,
        initial_weights: str | None,
        cohort: Cohort,
        workspace: Workspace,
    ) -> None:
        if initial_weights is not None:
            load_weights(autoencoder, initial_weights)
        if not autoencoder.state_dict():
            raise UserError("model.autoencoder has no weights to train: start with encode_latents.py")
        self.modules = {"autoencoder": autoencoder, "discriminator": discriminator}
        self.perceptual = perceptual or None
        self.kl_weight = kl_weight
        self.ssim_weight = ssim_weight
        self.perceptual_weight = perceptual_weight
        self.adversarial_weight = adversarial_weight
        self.adversarial_start = adversarial_start
        self.cohort = cohort
        self.train_rows = cohort.rows("train")
        self.num_samples = len(self.train_rows)
        self.sample_names = scan_names(cohort.table, self.train_rows)
        self.averages = {}

    def prepare(self, accelerator: Accelerator, trainer: TrainerSettings, optim: Optim, seed: int) -> None:
        """See Stage."""
        self.accelerator = accelerator
        self.seed = seed
        subjects = self.cohort.table["subject"].tolist()
        self.validation_rows = subsample_by_subject(self.cohort.rows("val"), subjects, trainer.validation_scans, seed)
        self.masks = BrainMasks()  # of validation scans
        self.channels_last = uses_channels_last(trainer, accelerator, latents=False)
        autoencoder, discriminator = (module_to_memory_format(m, self.channels_last) for m in self.modules.values())
        if trainer.checkpointing:
            autoencoder.enable_checkpointing()
        self.optimizers = {
            "generator": build_adam(autoencoder.parameters(), optim.lr, optim),
            "discriminator": build_adam(discriminator.parameters(), optim.discriminator_lr, optim),
        }
        self.autoencode, self.discriminator = accelerator.prepare(
            torch.compile(autoencoder) if trainer.compile else autoencoder, discriminator
        )
        self.update_generator = Updater(accelerator, self.autoencode, self.optimizers["generator"], trainer.clip)
        self.update_discriminator = Updater(
            accelerator, self.discriminator, self.optimizers["discriminator"], trainer.clip
        )
        if isinstance(self.perceptual, nn.Module):
            self.perceptual.to(accelerator.device)
        autoencoder.train()
        discriminator.train()

    def fetch(self, index: np.ndarray, position: np.ndarray, number: int) -> Batch:
        """Volumes as they are stored, the posterior's noise, and what augmentation and the perceptual loss draw."""
        volumes, autoencoder = self.cohort.volumes, self.modules["autoencoder"]
        shape = (autoencoder.latent_channels, *latent_sizes(volumes.shape, autoencoder.strides))
        batch = {
            "x": volumes.read_stored(self.train_rows[index]),
            "noise": draw_normal(shape, self.seed, position, stream="posterior"),
            **self.cohort.draw_augmentation(self.seed, position),
        }
        if self.perceptual is not None:
            batch |= self.perceptual.draw(volumes.shape, make_generator(self.seed, "perceptual", number))
        return batch

    def _scans(self, rows: np.ndarray) -> Tensor:
        """Volumes (B, 1, X, Y, Z) of table rows, on the device."""
        x = self.cohort.volumes.read_stored(rows).to(self.accelerator.device, non_blocking=True)
        return to_memory_format(self.cohort.volumes.decode(x), self.channels_last)

    def run_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """The generator's update, and the discriminator's on the same reconstructions: both are taken, or neither."""
        adversarial = self.adversarial_weight > 0 and step >= self.adversarial_start
        pairs: list[Batch] = []
        discriminator = self.modules["discriminator"]

        def generator_loss(batch: Batch) -> dict[str, Tensor]:
            batch = batch_to_device(batch, self.accelerator.device)
            x = self.cohort.augment(self.cohort.volumes.decode(batch["x"]), batch)
            x = to_memory_format(x, self.channels_last)
            reconstruction, mean, std = self.autoencode(x, batch["noise"])
            terms = {"l1": losses.reconstruction_l1(reconstruction, x), "kl": losses.kl_divergence(mean, std)}
            total = terms["l1"] + self.kl_weight * terms["kl"]
            if self.ssim_weight:
                terms["dissimilarity"] = structural_dissimilarity(reconstruction, x)
                total = total + self.ssim_weight * terms["dissimilarity"]
            if self.perceptual is not None:
                terms["perceptual"] = self.perceptual(reconstruction.float(), x, batch)
                total = total + self.perceptual_weight * terms["perceptual"]
            if adversarial:
                with self.accelerator.autocast():
                    scores = discriminator(reconstruction)[-1]
                terms["adversarial"] = losses.generator_adversarial(scores)
                total = total + self.adversarial_weight * terms["adversarial"]
                pairs.append({"x": x, "reconstruction": reconstruction.detach()})
            return {"loss": total, **terms}

        # The generator's forward passes move the statistics of the discriminator's norms, too.
        self.update_discriminator.buffers.save()
        # Frozen, the discriminator passes the gradient on and keeps none of it for its own update.
        discriminator.requires_grad_(False)
        try:
            updates = [(self.update_generator, self.update_generator.accumulate(micro_batches, generator_loss))]
        finally:
            discriminator.requires_grad_(True)
        if adversarial:
            found = self.update_discriminator.accumulate(pairs, self._discriminator_loss)
            updates.append((self.update_discriminator, found))
        return self.take_step(step, *updates)

    def _discriminator_loss(self, pair: Batch) -> dict[str, Tensor]:
        # One forward for both halves: DistributedDataParallel allows one before a backward.
        scores = self.discriminator(torch.cat([pair["x"], pair["reconstruction"].to(pair["x"].dtype)]))[-1]
        real, fake = scores.chunk(2)
        loss = losses.discriminator_adversarial(real, fake)
        return {"loss": self.adversarial_weight * loss, "discriminator": loss.detach()}

    def _reconstruct(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        x = self._scans(rows)
        autoencoder = self.modules["autoencoder"]
        with self.accelerator.autocast():
            mean, _ = autoencoder.encode(x)
            return x, autoencoder.decode(mean).float().clamp(0, 1)

    def _set_reference(self) -> None:
        """From training scans spread evenly over the table, so that many subjects are among them."""
        chosen = np.linspace(0, self.num_samples - 1, min(self.num_samples, REFERENCE_SCANS)).round().astype(int)
        self.modules["autoencoder"].set_reference(self._scans(self.train_rows[[index]]) for index in chosen)

    def validate(self) -> dict[str, float]:
        """L1, and SSIM over the volume and in the brain, of reconstructions from the posterior mean.

        Sets the latents' reference first, where there is one: that of the weights that may be published now.
        """
        if self.modules["autoencoder"].reference is not None:
            self._set_reference()
        found: dict[int, dict[str, Tensor]] = {}
        for row in shard_rows(self.validation_rows, self.accelerator):
            x, reconstruction = self._reconstruct(np.array([row]))
            whole, brain = ssim_whole_and_masked(reconstruction, x, self.masks(x, [row]))
            l1 = losses.reconstruction_l1(reconstruction, x).detach()
            found[int(row)] = {"l1": l1, "ssim": whole, "ssim_mask": brain}
        return mean_over_scans(found, self.accelerator)

    def preview(self) -> dict[str, Tensor]:
        """Scans and their reconstructions."""
        if not len(self.validation_rows):
            return {}
        x, reconstruction = self._reconstruct(self.validation_rows[:2])
        return {"scan": x, "reconstruction": reconstruction}
