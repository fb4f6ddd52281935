"""Stage 3: semantic encoder and gradient estimator fill the posterior-mean gap of the frozen U-Net (PDAE, 2212.12990).

    y = Enc(x)        minimise w_t |eps - (eps_theta(z_t, t) + c_t G(z_t, t, y))|^2, or |v - (v_theta + G)|^2

The noisy latent z_t lacks information about the scan, and only y can supply it: to lower this loss, y must describe the
content of the scan. No label is used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from ldae.config import Optim, TrainerSettings
from ldae.data.cohort import Cohort
from ldae.data.stream import Batch
from ldae.data.subsampling import subsample_by_subject
from ldae.data.table import scan_names
from ldae.data.visits import OtherVisits
from ldae.denoiser import Denoiser
from ldae.diffusion.process import add_noise
from ldae.diffusion.samplers import Sampler
from ldae.evaluation.images.image_metrics import BrainMasks, ssim_whole_and_masked
from ldae.evaluation.images.semantics import measure_z0_errors_of_scan, pair_with_other_subjects
from ldae.losses.denoising import gap_filling_loss
from ldae.models.gradient_estimator import GradientEstimator
from ldae.models.placement import place_module, to_memory_format
from ldae.models.state import load_weights
from ldae.models.unet import Features, UNet
from ldae.runs import Workspace, estimator_node
from ldae.stages.fit_encoder import fit_encoder
from ldae.stages.frozen_encoder import KnownEmbeddings, is_frozen
from ldae.stages.predecessors import match_latents, open_latents, refuse_other_split
from ldae.training.device import batch_to_device, load_volumes, uses_channels_last
from ldae.training.ema import Ema
from ldae.training.optimizer_step import StepResult, Updater, build_adam
from ldae.training.stage import Monitor, Stage
from ldae.training.step_graph import can_record
from ldae.training.validation import mean_over_scans, shard_rows
from ldae.utils.errors import UserError
from ldae.utils.seeding import draw_normal, draw_timesteps


class Trunk(nn.Module):
    """The frozen U-Net as one call, which can be compiled."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, z_t: Tensor, t: Tensor) -> tuple[Features, Tensor]:
        """z_t (B, C, X', Y', Z') and t (B,) to the features for the estimator and the output (B, C, X', Y', Z')."""
        features = self.unet.features(z_t, t)
        return features, self.unet.head(features)


class Conditioner(nn.Module):
    """All trained parts, encoder and estimator, as one call, which Accelerate wraps.

    Args:
        encoder: None if it is not trained; the call then takes y instead of the view.
    """

    def __init__(self, encoder: nn.Module | None, estimator: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.estimator = estimator

    def forward(self, x: Tensor, features: Features) -> Tensor:
        """View x of a scan (B, C, X, Y, Z) and features of z_t to G(z_t, t, Enc(x)), (B, C, X', Y', Z')."""
        return self.estimator(features, x if self.encoder is None else self.encoder(x))


class ReprStage(Stage):
    """Trains encoder and estimator and publishes those with the best SSIM of scans decoded from y alone.

    Args:
        encoder: semantic encoder, from the view of a scan (B, C, X, Y, Z) to y (B, dim).
        estimator: options of the gradient estimator; its architecture is that of the U-Net.
        sampler: decodes from y alone in validation.
        time_power: density of t proportional to t^(time_power - 1). 1 is uniform, as published; larger values favour
            high noise, where z_t says little about the scan and y can add most.
        other_visit: share of samples whose latent is that of another visit of the subject, if there is one. y then
            describes what the visits have in common, and less of contrast, bias field and noise. 0 as published.
        initial_weights: folder with encoder.safetensors and estimator.safetensors to start from, loaded strictly, such
            as `repr/weights` of another run with networks of the same sizes.
        aekl, pretrain, latents: folders of the predecessors; None: those of the workspace.
        keep_components: whether principal components in the encoder of `initial_weights` are kept. False: they are
            fitted to the training scans, so that no other scan is in them.
    """

    name = "repr"
    reads_views = True
    harmless_on_resume = (
        "aekl", "pretrain", "latents", "initial_weights", "estimator.start_from_unet", "keep_components",
        # Another number of channels than the weights have cannot be loaded. Runs of earlier versions do not state it.
        "encoder.channels", "encoder.backbone.channels", "encoder.backbone.in_channels",
    )  # fmt: skip
    monitor = Monitor("ssim", higher_is_better=True)
    published = ("encoder", "estimator")

    def __init__(
        self,
        encoder: nn.Module,
        estimator: DictConfig,
        sampler: Sampler,
        time_power: float,
        other_visit: float,
        initial_weights: str | None,
        aekl: str | None,
        pretrain: str | None,
        latents: str | None,
        cohort: Cohort,
        workspace: Workspace,
        keep_components: bool = False,
    ) -> None:
        first, second = workspace.predecessor("aekl", aekl), workspace.predecessor("pretrain", pretrain)
        for run in (first, second):
            refuse_other_split(run, cohort, workspace)
        self.predecessors = {run.path.name: run.metadata["weights"] for run in (first, second)}
        self.autoencoder = first.module("autoencoder", first.config.model.autoencoder)
        self.unet = second.module("unet", second.config.model.unet)
        # Schedule and parameterisation of the U-Net's own training: with others its predictions would be wrong.
        diffusion = instantiate(second.config.diffusion)
        self.schedule, self.parameterisation = diffusion.schedule, diffusion.parameterisation
        unet_config = second.config.model.unet
        self.modules = {"encoder": encoder, "estimator": self._build_estimator(unet_config, encoder.dim, estimator)}
        if initial_weights is not None:
            for name, module in self.modules.items():
                load_weights(module, Path(initial_weights) / f"{name}.safetensors")
        self.sampler = sampler
        self.time_power = time_power
        self.other_visit = other_visit
        self.fits_components = not (keep_components and initial_weights is not None)
        self.checkpoints = workspace.stage(self.name).path / "state"
        self.cohort = cohort
        self.latents = open_latents(latents, cohort.split_hash, workspace)
        if second.metadata["autoencoder_sha256"] != self.latents.autoencoder:
            raise UserError(f"{second.path} learned the latents of another autoencoder: train pretrain again")
        if not np.allclose(second.metadata["scale"], self.latents.scale, rtol=1e-3):
            raise UserError(f"{second.path} learned latents of another scale; scans have changed: train pretrain again")
        self.latent_rows = match_latents(cohort, self.latents)  # of each scan of the cohort; -1 without a latent
        self.train_rows = self._rows_with_latent("train")
        self.num_samples = len(self.train_rows)
        self.sample_names = scan_names(cohort.table, self.train_rows)

    def _build_estimator(self, unet: DictConfig, semantic_dim: int, options: DictConfig) -> GradientEstimator:
        """The gradient estimator for the U-Net with this config and y of width `semantic_dim`."""
        estimator = instantiate(estimator_node(unet, semantic_dim, options))
        if estimator.start_from_unet:
            estimator.start_from(self.unet)
        return estimator

    def _rows_with_latent(self, split: str) -> np.ndarray:
        rows = self.cohort.rows(split)
        return rows[self.latent_rows[rows] >= 0]

    def prepare(self, accelerator: Accelerator, trainer: TrainerSettings, optim: Optim, seed: int) -> None:
        """See Stage."""
        self.accelerator = accelerator
        self.seed = seed
        subjects = self.cohort.table["subject"].tolist()
        validation = self._rows_with_latent("val")
        self.validation_rows = subsample_by_subject(validation, subjects, trainer.validation_scans, seed)
        self.visits = OtherVisits(subjects, self.train_rows, self.other_visit, seed)
        self.masks = BrainMasks()  # of the autoencoder's reconstructions, which validation compares with
        self.schedule.to(accelerator.device)
        self.latents = self.latents.to(accelerator.device)
        self.channels_last = uses_channels_last(trainer, accelerator)
        for module in (self.autoencoder, self.unet):
            place_module(module, accelerator.device, self.channels_last)
        encoder, estimator = self.modules["encoder"], self.modules["estimator"]
        place_module(encoder, accelerator.device, self.channels_last)
        if not any(self.checkpoints.glob("step_*.json")):  # a checkpoint contains what was measured at the start
            fit_encoder(encoder, self.cohort.views, self.train_rows, accelerator, self.seed, self.fits_components)
        encoder.checkpointing = estimator.checkpointing = trainer.checkpointing
        self._prepare_training(trainer, optim)
        self.denoiser = Denoiser(self.unet, estimator, self.schedule, self.parameterisation)

    def _prepare_training(self, trainer: TrainerSettings, optim: Optim) -> None:
        """Wrap the networks; build optimiser, with a learning rate of its own for the encoder, and moving averages."""
        encoder, estimator = self.modules["encoder"], self.modules["estimator"]
        self.embeddings = None
        if is_frozen(encoder):
            self.embeddings = KnownEmbeddings(encoder, encoder.dim, self.num_samples, self.accelerator.device)
        trunk, conditioner = Trunk(self.unet), Conditioner(None if self.embeddings else encoder, estimator)
        conditioner = place_module(conditioner, self.accelerator.device, self.channels_last)
        rates = {encoder: optim.lr if optim.encoder_lr is None else optim.encoder_lr, estimator: optim.lr}
        trained = {name: module for name, module in self.modules.items() if not is_frozen(module)}
        groups = [{"params": list(module.parameters()), "lr": rates[module]} for module in trained.values()]
        self.optimizers = {"conditioner": build_adam(groups, optim.lr, optim)}
        self.trunk = torch.compile(trunk) if trainer.compile else trunk
        self.conditioner = self.accelerator.prepare(torch.compile(conditioner) if trainer.compile else conditioner)
        record, optimizer = can_record(trainer, self.accelerator), self.optimizers["conditioner"]
        self.update = Updater(self.accelerator, self.conditioner, optimizer, trainer.clip, record)
        self.averages = {}
        if trainer.ema:
            self.averages = {name: Ema(module, trainer.ema, trainer.ema_warmup) for name, module in trained.items()}
        conditioner.train()

    def fetch(self, index: np.ndarray, position: np.ndarray, number: int) -> Batch:
        """Views as stored, rows of the latents that y must explain, and the random draws for them."""
        rows, shape = self.train_rows[index], self.latents.mean.shape[1:]
        augmentation = self.cohort.draw_view_augmentation(self.seed, position)
        views = {}
        if augmentation or self.embeddings is None or not self.embeddings.has(index):
            views = {"x": self.cohort.views.read_stored(rows)}  # (B, C, X, Y, Z)
        if self.embeddings is not None and not augmentation:
            views["sample"] = torch.from_numpy(index)  # (B,)
        return {
            **views,
            **augmentation,
            "row": torch.from_numpy(self.latent_rows[self.visits.choose(rows, position)]),  # (B,)
            "posterior": draw_normal(shape, self.seed, position, "train/posterior"),  # (B, C, X', Y', Z')
            "noise": draw_normal(shape, self.seed, position, "train/noise"),  # (B, C, X', Y', Z')
            "t": self._draw_timesteps(position),  # (B,)
        }

    def _draw_timesteps(self, keys: Sequence[int]) -> Tensor:
        """Timesteps (B,) int64 with a density proportional to t^(time_power - 1)."""
        count = self.schedule.timesteps
        uniform = (draw_timesteps(count, self.seed, keys, "train/t").double() + 0.5) / count
        return (count * uniform ** (1 / self.time_power)).long()

    def run_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """Update encoder and estimator, and their moving averages."""
        if self.embeddings is not None:
            micro_batches = [self.embed_batch(batch) for batch in micro_batches]
        return self.take_step(step, (self.update, self.update.accumulate(micro_batches, self._loss)))

    @torch.no_grad()
    def embed_batch(self, batch: Batch) -> Batch:
        """The micro-batch with y by the frozen encoder, (B, dim), instead of the views; on the device."""
        batch = batch_to_device(batch, self.accelerator.device)
        x = self._views(batch) if "x" in batch else None
        with self.accelerator.autocast():
            known = "sample" in batch
            y = self.embeddings(batch["index"], batch["sample"], x) if known else self.modules["encoder"](x).float()
        return {**{name: value for name, value in batch.items() if name != "x"}, "y": y}

    def _views(self, batch: Batch) -> Tensor:
        """What the encoder sees of a micro-batch on the device, (B, C, X, Y, Z).

        Only the encoder sees an augmented scan. The latent is that of the scan itself, or of another visit.
        """
        return self.cohort.augment(self.cohort.views.decode(batch["x"]), batch)

    def _loss(self, batch: Batch) -> dict[str, Tensor]:
        """w_t |eps - (eps_theta + c_t G)|^2, or |v - (v_theta + G)|^2, mean over the micro-batch."""
        batch = batch_to_device(batch, self.accelerator.device)
        source = self._views(batch) if self.embeddings is None else batch["y"]
        z0 = self.latents.sample(batch["row"], batch["posterior"])  # (B, C, X', Y', Z'), unit variance
        z0, noise = (to_memory_format(value, self.channels_last) for value in (z0, batch["noise"]))
        z_t = add_noise(self.schedule, z0, noise, batch["t"])  # sqrt(A_t) z_0 + sqrt(1 - A_t) eps
        with torch.no_grad(), self.accelerator.autocast():
            features, output = self.trunk(z_t, batch["t"])  # output: eps_theta or v_theta, (B, C, X', Y', Z')
        gradient = self.conditioner(source, features)  # G(z_t, t, Enc(x)), (B, C, X', Y', Z')
        parameterisation, schedule = self.parameterisation, self.schedule
        return {"loss": gap_filling_loss(parameterisation, schedule, output, gradient, z0, noise, batch["t"])}

    def validate(self) -> dict[str, float]:
        """SSIM of scans decoded from y alone, and errors of the predicted z_0 with the own, another's and no y.

        The SSIM is against the autoencoder's reconstruction, the best that decoding from y can reach. The errors are
        given by band of t (evaluation/images/semantics.py).
        """
        rows = self.validation_rows
        if len(rows) < 2:
            return {}
        metrics: dict[int, dict[str, Tensor]] = {}
        partner = pair_with_other_subjects(self.cohort.table["subject"].to_numpy()[rows])
        others = dict(zip(rows.tolist(), rows if partner is None else rows[partner], strict=True))
        for row in shard_rows(rows, self.accelerator):
            metrics[int(row)] = self._validate_scan(int(row), int(others[int(row)]))
        return mean_over_scans(metrics, self.accelerator)

    def _validate_scan(self, row: int, other: int) -> dict[str, Tensor]:
        """Metrics of one scan; `other` is a scan of another subject."""
        x = load_volumes(self.cohort.views, np.array([row, other]), self.accelerator.device)
        latent = torch.from_numpy(self.latent_rows[[row]]).to(self.accelerator.device, non_blocking=True)
        with self.accelerator.autocast():
            y = self.modules["encoder"](x).float()  # (2, dim)
            z0 = self.latents.sample(latent, self._draw_noise([row], "posterior"))
            z0 = to_memory_format(z0, self.channels_last)
            target = self._decompress(z0)
            decoded = self._decode_from_y(y[:1], [row])
            errors = measure_z0_errors_of_scan(self.denoiser, z0, y[:1], y[1:], self.seed, row)
        whole, brain = ssim_whole_and_masked(decoded, target, self.masks(target, [row]))
        return {"ssim": whole, "ssim_mask": brain, **errors}

    def preview(self) -> dict[str, Tensor]:
        """Scans, and their decodings from y alone."""
        rows = self.validation_rows[:2]
        if not len(rows):
            return {}
        x = load_volumes(self.cohort.volumes, rows, self.accelerator.device)
        view = load_volumes(self.cohort.views, rows, self.accelerator.device)
        with self.accelerator.autocast():
            y = self.modules["encoder"](view).float()
            decoded = self._decode_from_y(y, [int(row) for row in rows])
        return {"scan": x, "from y alone": decoded}

    def _decode_from_y(self, y: Tensor, keys: Sequence[int]) -> Tensor:
        """Volumes (B, 1, X, Y, Z) decoded from y (B, dim) and a z_T that depends on (seed, key) alone."""
        eps_fn = self.denoiser.guided_eps(y, self.sampler.guidance)
        return self._decompress(self.sampler.sample(eps_fn, self._draw_noise(keys, "noise"), self.schedule))

    def _draw_noise(self, keys: Sequence[int], purpose: str) -> Tensor:
        noise = draw_normal(self.latents.mean.shape[1:], self.seed, keys, f"validation/{purpose}")
        return to_memory_format(noise.to(self.accelerator.device, non_blocking=True), self.channels_last)

    def _decompress(self, z0: Tensor) -> Tensor:
        """Volumes (B, 1, X, Y, Z) in [0, 1] of latents of unit variance."""
        scale = self.latents.scale.view(1, -1, 1, 1, 1)
        return self.autoencoder.decode(z0 / scale).float().clamp(0, 1)

    def metadata(self) -> dict[str, Any]:
        """The weights of the predecessors that encoder and estimator were trained with."""
        return {"stands_on": self.predecessors}
