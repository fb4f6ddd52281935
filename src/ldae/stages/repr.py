"""Stage 3: a semantic encoder and a gradient estimator fill the frozen U-Net's posterior-mean gap (PDAE, 2212.12990).

What z_t has lost, y = Enc(x) must supply: nothing else can lower this loss, so that y says what is in the scan.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from torch import Tensor, nn

from ldae.config import Optim, TrainerSettings
from ldae.data.cohort import Cohort
from ldae.data.stream import Batch
from ldae.data.subsampling import subsample_by_subject
from ldae.data.table import scan_names
from ldae.denoiser import Denoiser
from ldae.diffusion.process import add_noise
from ldae.evaluation.images.image_metrics import BrainMasks, ssim_whole_and_masked
from ldae.evaluation.images.semantics import measure_z0_errors_of_scan, pair_with_other_subjects
from ldae.losses.denoising import gap_filling_loss
from ldae.models.state import load_weights
from ldae.models.unet import Features, UNet
from ldae.runs import Workspace, estimator_node
from ldae.stages.pretrain import open_latents
from ldae.training.device import batch_to_device, module_to_memory_format, to_memory_format, uses_channels_last
from ldae.training.ema import Ema
from ldae.training.optimizer_step import StepResult, Updater, build_adam
from ldae.training.stage import Monitor, Stage
from ldae.training.validation import mean_over_scans, shard_rows
from ldae.utils.errors import UserError
from ldae.utils.seeding import draw_normal, draw_timesteps, make_generator

REFERENCE_SCANS = 512


class Trunk(nn.Module):
    """The frozen U-Net in one call: its features, for the estimator, and its own output."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, z_t: Tensor, t: Tensor) -> tuple[Features, Tensor]:
        """z_t (B, C, X', Y', Z') and t (B,) to features and output (B, C, X', Y', Z')."""
        features = self.unet.features(z_t, t)
        return features, self.unet.head(features)


class Conditioner(nn.Module):
    """Encoder and estimator in one call: all that is trained, wrapped once."""

    def __init__(self, encoder: nn.Module, estimator: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.estimator = estimator

    def forward(self, x: Tensor, features: Features) -> Tensor:
        """Scan (B, 1, X, Y, Z) and the trunk's features of z_t to G (B, C, X', Y', Z')."""
        return self.estimator(features, self.encoder(x))


class ReprStage(Stage):
    """Trains encoder and estimator; the best by SSIM of decoding from y alone is published. No label is read.

    Args:
        encoder: maps (B, 1, X, Y, Z) to (B, dim).
        estimator: options of the gradient estimator; its architecture is the U-Net's.
        sampler: decodes from y alone in validation.
        time_power: t is drawn with a density that grows as t^(time_power - 1); 1: uniform, as published. What y can add
            lies at high noise, where z_t says little.
        other_visit: share of samples whose latent is that of another visit of the same subject, where there is one: y
            then says what stays, less of contrast, bias field and noise. 0: the scan's own always, as published.
        initial_weights: folder with encoder.safetensors and estimator.safetensors to start from, loaded strictly: the
            `repr/weights` of another run whose networks are of the same shape.
        aekl, pretrain, latents: paths of the predecessors; None: siblings under the same name.
    """

    name = "repr"
    harmless_on_resume = ("aekl", "pretrain", "latents", "initial_weights", "estimator.start_from_unet")
    monitor = Monitor("ssim", higher_is_better=True)
    published = ("encoder", "estimator")

    def __init__(
        self,
        encoder: nn.Module,
        estimator: Any,
        sampler: Any,
        time_power: float,
        other_visit: float,
        initial_weights: str | None,
        aekl: str | None,
        pretrain: str | None,
        latents: str | None,
        cohort: Cohort,
        workspace: Workspace,
    ) -> None:
        first, second = workspace.predecessor("aekl", aekl), workspace.predecessor("pretrain", pretrain)
        for run in (first, second):
            if run.metadata["split_hash"] != cohort.split_hash:
                raise UserError(f"{run.path} was trained on another split of the subjects than {workspace.split_file}")
        self.autoencoder = first.module("autoencoder", first.config.model.autoencoder)
        self.unet = second.module("unet", second.config.model.unet)
        # The U-Net's own schedule and parameterisation: another would make its predictions meaningless.
        diffusion = instantiate(second.config.diffusion)
        self.schedule, self.parameterisation = diffusion.schedule, diffusion.parameterisation
        estimator = instantiate(estimator_node(second.config.model.unet, encoder.dim, estimator))
        if estimator.start_from_unet:
            estimator.start_from(self.unet)
        self.modules = {"encoder": encoder, "estimator": estimator}
        if initial_weights is not None:
            for name, module in self.modules.items():
                load_weights(module, Path(initial_weights) / f"{name}.safetensors")
        self.sampler = sampler
        self.time_power = time_power
        self.other_visit = other_visit
        self.cohort = cohort
        self.latents = open_latents(latents, cohort, workspace)
        if second.metadata["autoencoder_sha256"] != self.latents.autoencoder:
            raise UserError(f"{second.path} learned the latents of another autoencoder: train pretrain again")
        self.pairs = self._pair_rows()
        self.train_rows = np.flatnonzero((cohort.table["split"] == "train").to_numpy() & (self.pairs >= 0))
        self.num_samples = len(self.train_rows)
        self.sample_names = scan_names(cohort.table, self.train_rows)
        self.sources = {run.path.name: run.metadata["weights"] for run in (first, second)}

    def _pair_rows(self) -> np.ndarray:
        """For each row of the cohort the row of its latent, or -1."""
        key = ["subject", "session"]
        rows = {pair: row for row, pair in enumerate(self.latents.table[key].itertuples(index=False, name=None))}
        pairs = [rows.get(pair, -1) for pair in self.cohort.table[key].itertuples(index=False, name=None)]
        if not any(pair >= 0 for pair in pairs):
            raise UserError("no scan of the table has a latent: run encode_latents.py with the same table")
        return np.array(pairs)

    def prepare(self, accelerator: Accelerator, trainer: TrainerSettings, optim: Optim, seed: int) -> None:
        """See Stage."""
        self.accelerator = accelerator
        self.seed = seed
        validation = np.flatnonzero((self.cohort.table["split"] == "val").to_numpy() & (self.pairs >= 0))
        subjects = self.cohort.table["subject"].tolist()
        self.validation_rows = subsample_by_subject(validation, subjects, trainer.validation_scans, seed)
        subject = self.cohort.table["subject"].iloc[self.train_rows]
        self.visits = {name: self.train_rows[places] for name, places in subject.groupby(subject).indices.items()}
        self.masks = BrainMasks()  # of what validation decodes from z, which is the same every time
        self.schedule.to(accelerator.device)
        self.latents = self.latents.to(accelerator.device)
        self.channels_last = uses_channels_last(trainer, accelerator)
        for module in (self.autoencoder, self.unet):
            module_to_memory_format(module.to(accelerator.device), self.channels_last)
        encoder, estimator = self.modules["encoder"], self.modules["estimator"]
        if encoder.reference is not None:
            encoder.set_reference(*self._mean_volume())
        encoder.checkpointing = estimator.checkpointing = trainer.checkpointing
        conditioner = module_to_memory_format(Conditioner(encoder, estimator), self.channels_last)
        rates = {encoder: optim.lr if optim.encoder_lr is None else optim.encoder_lr, estimator: optim.lr}
        groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in rates.items()]
        self.optimizers = {"conditioner": build_adam(groups, optim.lr, optim)}
        trunk = Trunk(self.unet)
        self.trunk = torch.compile(trunk) if trainer.compile else trunk
        self.conditioner = accelerator.prepare(torch.compile(conditioner) if trainer.compile else conditioner)
        self.update = Updater(accelerator, self.conditioner, self.optimizers["conditioner"], trainer.clip)
        self.averages = (
            {n: Ema(m, trainer.ema, trainer.ema_warmup) for n, m in self.modules.items()} if trainer.ema else {}
        )
        self.denoiser = Denoiser(self.unet, estimator, self.schedule, self.parameterisation)
        conditioner.train()

    def _mean_volume(self) -> tuple[Tensor, Tensor]:
        """Of the first training scans: their mean (1, 1, X, Y, Z), and the root mean square of what differs from it."""
        rows = self.train_rows[:REFERENCE_SCANS]
        chunks = [rows[start : start + 8] for start in range(0, len(rows), 8)]
        total = squares = torch.zeros(())
        for chunk in chunks:
            x = self.cohort.volumes.batch(chunk).double()
            total, squares = total + x.sum(0, keepdim=True), squares + x.square().sum(0, keepdim=True)
        mean = total / len(rows)
        return mean.float(), (squares / len(rows) - mean**2).mean().clamp(min=1e-12).sqrt().float()

    def fetch(self, index: np.ndarray, position: np.ndarray, number: int) -> Batch:
        """Volumes as they are stored, the rows of the latents that y must explain, and what is drawn for them."""
        rows, shape = self.train_rows[index], self.latents.mean.shape[1:]
        return {
            "x": self.cohort.volumes.read_stored(rows),
            "row": torch.from_numpy(self.pairs[self._explained(rows, position)]),
            "posterior": draw_normal(shape, self.seed, position, "train/posterior"),
            "noise": draw_normal(shape, self.seed, position, "train/noise"),
            "t": self._times(position),
            **self.cohort.draw_augmentation(self.seed, position),
        }

    def _scans(self, rows: np.ndarray) -> Tensor:
        """Volumes (B, 1, X, Y, Z) of table rows, on the device."""
        x = self.cohort.volumes.read_stored(rows).to(self.accelerator.device, non_blocking=True)
        return self.cohort.volumes.decode(x)

    def _validation_noise(self, keys: Sequence[int], purpose: str) -> Tensor:
        noise = draw_normal(self.latents.mean.shape[1:], self.seed, keys, f"validation/{purpose}")
        return to_memory_format(noise.to(self.accelerator.device, non_blocking=True), self.channels_last)

    def _times(self, keys: Sequence[int]) -> Tensor:
        """Timesteps (B,) of `time_power`'s density."""
        count = self.schedule.timesteps
        uniform = (draw_timesteps(count, self.seed, keys, "train/t").double() + 0.5) / count
        return (count * uniform ** (1 / self.time_power)).long()

    def _explained(self, rows: np.ndarray, keys: Sequence[int]) -> np.ndarray:
        """For each training row the one whose latent y must explain: itself, or another visit of the subject."""
        if not self.other_visit:
            return rows
        chosen = rows.copy()
        for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
            visits = self.visits[self.cohort.table["subject"].iat[row]]
            others = visits[visits != row]
            chance, which = torch.rand(2, generator=make_generator(self.seed, "train/visit", int(key))).tolist()
            if len(others) and chance < self.other_visit:
                chosen[i] = others[int(which * len(others))]
        return chosen

    def _loss(self, batch: Batch) -> dict[str, Tensor]:
        batch = batch_to_device(batch, self.accelerator.device)
        # The encoder may see an augmented scan; what it must explain is the unchanged latent, or another visit's.
        x = self.cohort.augment(self.cohort.volumes.decode(batch["x"]), batch)
        z0 = self.latents.sample(batch["row"], batch["posterior"])
        z0, noise, t = (
            to_memory_format(z0, self.channels_last),
            to_memory_format(batch["noise"], self.channels_last),
            batch["t"],
        )
        z_t = add_noise(self.schedule, z0, noise, t)
        with torch.no_grad(), self.accelerator.autocast():
            features, output = self.trunk(z_t, t)
        gradient = self.conditioner(x, features)
        return {"loss": gap_filling_loss(self.parameterisation, self.schedule, output, gradient, z0, noise, t)}

    def run_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """One update of encoder and estimator, one of their averages."""
        return self.take_step(step, (self.update, self.update.accumulate(micro_batches, self._loss)))

    def _decode_from_y(self, y: Tensor, keys: Sequence[int]) -> Tensor:
        """Volumes from y alone, z_T fixed by `keys`."""
        eps_fn = self.denoiser.guided_eps(y, self.sampler.guidance)
        z0 = self.sampler.sample(eps_fn, self._validation_noise(keys, "noise"), self.schedule)
        return self._decompress(z0)

    def _decompress(self, z0: Tensor) -> Tensor:
        scale = self.latents.scale.view(1, -1, 1, 1, 1)
        return self.autoencoder.decode(z0 / scale).float().clamp(0, 1)

    def validate(self) -> dict[str, float]:
        """SSIM of decoding from y alone against decode(z); z_0 errors by band of t with own, another's and no y."""
        rows = self.validation_rows
        if len(rows) < 2:
            return {}
        found: dict[int, dict[str, Tensor]] = {}
        partner = pair_with_other_subjects(self.cohort.table["subject"].to_numpy()[rows])
        others = dict(zip(rows.tolist(), rows if partner is None else rows[partner], strict=True))
        for row in shard_rows(rows, self.accelerator):
            both, key = np.array([row, others[int(row)]]), int(row)
            with self.accelerator.autocast():
                y = self.modules["encoder"](self._scans(both)).float()
                latent = torch.from_numpy(self.pairs[both[:1]]).to(self.accelerator.device, non_blocking=True)
                z0 = to_memory_format(
                    self.latents.sample(latent, self._validation_noise([key], "posterior")), self.channels_last
                )
                target = self._decompress(z0)
                decoded = self._decode_from_y(y[:1], [key])
                errors = measure_z0_errors_of_scan(self.denoiser, z0, y[:1], y[1:], self.seed, key)
            whole, brain = ssim_whole_and_masked(decoded, target, self.masks(target, [row]))
            found[key] = {"ssim": whole, "ssim_mask": brain, **errors}
        return mean_over_scans(found, self.accelerator)

    def preview(self) -> dict[str, Tensor]:
        """Scans, and what y alone says of them."""
        rows = self.validation_rows[:2]
        if not len(rows):
            return {}
        x = self._scans(rows)
        with self.accelerator.autocast():
            y = self.modules["encoder"](x).float()
            decoded = self._decode_from_y(y, [int(row) for row in rows])
        return {"scan": x, "from y alone": decoded}

    def metadata(self) -> dict[str, Any]:
        """The weights it stands on."""
        return {"stands_on": self.sources}
