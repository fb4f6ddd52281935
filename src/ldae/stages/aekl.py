"""Stage 1: an AutoencoderKL compresses scans; it is trained against a patch discriminator.

    generator      L1 + kl_weight KL + perceptual_weight perceptual + adversarial_weight LSGAN
                   + ssim_weight (1 - SSIM), an addition, 0 as published
    discriminator  adversarial_weight LSGAN

Equation 25 of latent diffusion (arXiv 2112.10752) with the weights of LDAE (arXiv 2504.08635).
"""

from collections.abc import Sequence

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
from ldae.models.placement import place_module, to_memory_format
from ldae.models.sizes import latent_sizes
from ldae.models.state import load_weights
from ldae.runs import Workspace
from ldae.training.device import batch_to_device, load_volumes, uses_channels_last
from ldae.training.optimizer_step import StepResult, Updater, build_adam
from ldae.training.stage import Monitor, Stage
from ldae.training.validation import mean_over_scans, shard_rows
from ldae.utils.errors import UserError
from ldae.utils.seeding import draw_normal, make_generator

MEAN_LATENT_SCANS = 96  # training scans in the autoencoder's mean latent, at most


class AutoencoderStage(Stage):
    """Trains autoencoder and discriminator, each with its own optimiser; publishes the autoencoder of the best L1.

    Args:
        autoencoder: the AutoencoderKL, which is the generator.
        discriminator: maps volumes to a list of feature maps, the last of which are the patch scores.
        perceptual: perceptual distance, SliceLpips or MedicalNetDistance; None trains without the term.
        kl_weight, ssim_weight, perceptual_weight: factors on terms of the generator's loss.
        adversarial_weight: factor on the adversarial loss of both generator and discriminator, as published.
        adversarial_start: optimiser step at which the discriminator is switched on.
        initial_weights: file with the weights of an AutoencoderKL to start from, loaded strictly.
    """

    name = "aekl"
    harmless_on_resume = ("initial_weights",)
    monitor = Monitor("l1", higher_is_better=False)
    published = ("autoencoder",)

    def __init__(
        self,
        autoencoder: nn.Module,
        discriminator: nn.Module,
        perceptual: nn.Module | None,
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
        self.perceptual = perceptual or None  # perceptual=none is an empty config
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
        self.masks = BrainMasks()  # of the validation scans
        self.channels_last = uses_channels_last(trainer, accelerator, latents=False)
        autoencoder, discriminator = (
            place_module(m, accelerator.device, self.channels_last) for m in self.modules.values()
        )
        if trainer.checkpointing:
            autoencoder.enable_checkpointing()
        self.optimizers = {
            "generator": build_adam(autoencoder.parameters(), optim.lr, optim),
            "discriminator": build_adam(discriminator.parameters(), optim.discriminator_lr, optim),
        }
        self.autoencode, self.discriminate = accelerator.prepare(
            torch.compile(autoencoder) if trainer.compile else autoencoder, discriminator
        )
        self.update_generator = Updater(accelerator, self.autoencode, self.optimizers["generator"], trainer.clip)
        self.update_discriminator = Updater(
            accelerator, self.discriminate, self.optimizers["discriminator"], trainer.clip
        )
        if self.perceptual is not None:
            self.perceptual.to(accelerator.device)
        autoencoder.train()
        discriminator.train()

    def fetch(self, index: np.ndarray, position: np.ndarray, number: int) -> Batch:
        """Volumes as stored, and the random draws of the posterior, the augmentation and the perceptual loss."""
        volumes, autoencoder = self.cohort.volumes, self.modules["autoencoder"]
        shape = (autoencoder.latent_channels, *latent_sizes(volumes.shape, autoencoder.strides))
        batch = {
            "x": volumes.read_stored(self.train_rows[index]),  # (B, 1, X, Y, Z)
            "noise": draw_normal(shape, self.seed, position, stream="posterior"),  # (B, C, X', Y', Z')
            **self.cohort.draw_augmentation(self.seed, position),
        }
        if self.perceptual is not None:
            batch |= self.perceptual.draw(volumes.shape, make_generator(self.seed, "perceptual", number))
        return batch

    def run_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """Update generator and discriminator on the same reconstructions: both, or neither if a loss is not finite."""
        adversarial = self.adversarial_weight > 0 and step >= self.adversarial_start
        discriminator = self.modules["discriminator"]
        pairs: list[Batch] = []  # scans and their reconstructions, for the discriminator

        def generator_loss(batch: Batch) -> dict[str, Tensor]:
            batch = batch_to_device(batch, self.accelerator.device)
            x = self.cohort.augment(self.cohort.volumes.decode(batch["x"]), batch)
            x = to_memory_format(x, self.channels_last)  # (B, 1, X, Y, Z)
            reconstruction, mean, std = self.autoencode(x, batch["noise"])
            loss, terms = self._reconstruction_loss(x, reconstruction, mean, std, batch)
            if adversarial:
                with self.accelerator.autocast():
                    scores = discriminator(reconstruction)[-1]
                terms["adversarial"] = losses.generator_adversarial(scores)
                loss = loss + self.adversarial_weight * terms["adversarial"]
                pairs.append({"x": x, "reconstruction": reconstruction.detach()})
            return {"loss": loss, **terms}

        # The generator's forward passes also update the running statistics of the discriminator's norms.
        self.update_discriminator.buffers.save()
        # While frozen, the discriminator passes gradients on to the generator but keeps none for its own update.
        discriminator.requires_grad_(False)
        try:
            updates = [(self.update_generator, self.update_generator.accumulate(micro_batches, generator_loss))]
        finally:
            discriminator.requires_grad_(True)
        if adversarial:
            gradients = self.update_discriminator.accumulate(pairs, self._discriminator_loss)
            updates.append((self.update_discriminator, gradients))
        return self.take_step(step, *updates)

    def _reconstruction_loss(
        self, x: Tensor, reconstruction: Tensor, mean: Tensor, std: Tensor, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The generator's loss without the adversarial term, and its terms before their weights, by name.

        Args:
            x, reconstruction: (B, 1, X, Y, Z).
            mean, std: of the posterior, (B, C, X', Y', Z').
            batch: contains the draws of the perceptual loss.
        """
        terms = {"l1": losses.reconstruction_l1(reconstruction, x), "kl": losses.kl_divergence(mean, std)}
        loss = terms["l1"] + self.kl_weight * terms["kl"]
        if self.ssim_weight:
            terms["dissimilarity"] = structural_dissimilarity(reconstruction, x)
            loss = loss + self.ssim_weight * terms["dissimilarity"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstruction.float(), x, batch)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        return loss, terms

    def _discriminator_loss(self, pair: Batch) -> dict[str, Tensor]:
        """Least-squares loss on scans against their reconstructions."""
        # One forward pass for both, because DistributedDataParallel allows only one before a backward pass.
        scores = self.discriminate(torch.cat([pair["x"], pair["reconstruction"].to(pair["x"].dtype)]))[-1]
        real, fake = scores.chunk(2)
        loss = losses.discriminator_adversarial(real, fake)
        return {"loss": self.adversarial_weight * loss, "discriminator": loss.detach()}

    def validate(self) -> dict[str, float]:
        """L1, and SSIM over the volume and in the brain, of reconstructions from the posterior mean.

        If the autoencoder subtracts a mean latent, that is first set for the weights that may now be published.
        """
        if self.modules["autoencoder"].mean_latent is not None:
            self._set_mean_latent()
        metrics: dict[int, dict[str, Tensor]] = {}
        for row in shard_rows(self.validation_rows, self.accelerator):
            x, reconstruction = self._reconstruct(np.array([row]))
            whole, brain = ssim_whole_and_masked(reconstruction, x, self.masks(x, [row]))
            l1 = losses.reconstruction_l1(reconstruction, x).detach()
            metrics[int(row)] = {"l1": l1, "ssim": whole, "ssim_mask": brain}
        return mean_over_scans(metrics, self.accelerator)

    def preview(self) -> dict[str, Tensor]:
        """Scans and their reconstructions."""
        if not len(self.validation_rows):
            return {}
        x, reconstruction = self._reconstruct(self.validation_rows[:2])
        return {"scan": x, "reconstruction": reconstruction}

    def _set_mean_latent(self) -> None:
        """Set the mean latent from training scans spaced evenly over the table, so that they are of many subjects."""
        chosen = np.linspace(0, self.num_samples - 1, min(self.num_samples, MEAN_LATENT_SCANS)).round().astype(int)
        self.modules["autoencoder"].set_mean_latent(self._load(self.train_rows[[index]]) for index in chosen)

    def _reconstruct(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Scans of these rows and their reconstructions from the posterior mean, (B, 1, X, Y, Z) each."""
        x = self._load(rows)
        autoencoder = self.modules["autoencoder"]
        with self.accelerator.autocast():
            mean, _ = autoencoder.encode(x)
            return x, autoencoder.decode(mean).float().clamp(0, 1)

    def _load(self, rows: np.ndarray) -> Tensor:
        """Volumes (B, 1, X, Y, Z) of these rows, on the device and in the memory format of the networks."""
        x = load_volumes(self.cohort.volumes, rows, self.accelerator.device)
        return to_memory_format(x, self.channels_last)
