"""The semantic prior, a stage after the three of the method: the distribution of y, given columns of the table.

    u = whitened y        minimise |v - v_prior(u_t, t, labels)|^2

After DiffAE's latent DDIM (arXiv 2111.15640). y of the training scans is computed once, by the frozen encoder of stage
3. Every subject counts alike, whatever the number of scans. Labels are dropped at random, all of them or single ones.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor, nn

from ldae.config import Optim, TrainerSettings
from ldae.data.cohort import Cohort
from ldae.data.stream import Batch
from ldae.data.table import scan_names
from ldae.diffusion.process import add_noise
from ldae.evaluation.embeddings import embed_rows, embeddings_key, load_or_compute_embeddings
from ldae.prior.columns import encode_table, find_columns
from ldae.prior.semantic_prior import SemanticPrior
from ldae.runs import Run, Workspace, build_stored, prior_node
from ldae.stages.predecessors import refuse_other_split
from ldae.training.device import batch_to_device
from ldae.training.ema import Ema
from ldae.training.optimizer_step import StepResult, Updater, build_adam
from ldae.training.stage import Monitor, Stage
from ldae.utils.errors import UserError
from ldae.utils.seeding import draw_normal

log = logging.getLogger(__name__)

BATCH = 16  # scans that are embedded at a time
LEVELS = 16  # timesteps at which each scan is validated


class PriorStage(Stage):
    """Fits the Gaussian part of the prior before training, and trains the network, if there is one.

    Args:
        prior: settings of `SemanticPrior` but those that depend on the encoder and the table.
        columns: names of the columns of the table that y is conditioned on; none is possible.
        drop_labels: probability that a training scan has no labels, and that it lacks each of them.
        initial_weights: not used by this stage, must be None.
        repr: folder of stage 3; None: that of the workspace.

    Raises:
        UserError: stage 3 was trained on other data, or a column cannot be used.
    """

    name = "prior"
    reads_views = True
    harmless_on_resume = ("repr",)
    monitor = Monitor("loss", higher_is_better=False)
    published = ("prior",)

    def __init__(
        self,
        prior: DictConfig,
        columns: Sequence[str],
        drop_labels: float,
        initial_weights: str | None,
        repr: str | None,
        cohort: Cohort,
        workspace: Workspace,
    ) -> None:
        if initial_weights is not None:
            raise UserError("stage.initial_weights: a prior starts from no weights; leave it out")
        third = workspace.predecessor("repr", repr)
        _check_same_data(third, cohort, workspace)
        self.encoder = third.module("encoder", third.config.model.encoder)
        self.encoder_sha256 = third.sha256("encoder")
        self.cohort, self.drop_labels = cohort, drop_labels
        self.folder = workspace.stage(self.name).path
        self.train_rows, self.validation_rows = cohort.rows("train"), cohort.rows("val")
        table = cohort.table
        self.columns = find_columns(table.iloc[self.train_rows], list(columns))
        self.labels = encode_table(self.columns, table)  # (N, C)
        self.column_entries = [column.to_dict() for column in self.columns]
        node = prior_node(prior, self.encoder.dim, self.column_entries)
        self.modules = {"prior": build_stored(node, "model.prior")}
        self.num_samples = len(self.train_rows)
        self.sample_names = scan_names(table, self.train_rows)

    def prepare(self, accelerator: Accelerator, trainer: TrainerSettings, optim: Optim, seed: int) -> None:
        """See Stage."""
        self.accelerator, self.seed = accelerator, seed
        device = accelerator.device
        prior: SemanticPrior = self.modules["prior"].to(device)
        self.y = self._embed(np.concatenate([self.train_rows, self.validation_rows])).to(device)  # (N, dim)
        self.sample_weights = self._subject_weights(self.train_rows).to(device)
        y = self.y[: self.num_samples]
        subjects = self.cohort.table["subject"].iloc[self.train_rows].nunique()
        labels = self.labels[self.train_rows].to(device)
        self.kept_variance = prior.fit(y, labels, self.sample_weights, subjects)
        self.u = prior.whitening.whiten(self.y)  # (N, components)
        self.exists = prior.whitening.exists
        log.info(
            "prior of y: %d directions with %.1f %% of the variance of %d subjects; conditions: %s",
            int(self.exists.sum()), 100 * self.kept_variance, subjects,
            ", ".join(column.name for column in self.columns) or "none",
        )  # fmt: skip
        prior.schedule.to(device)
        self.optimizers, self.averages = {}, {}
        if prior.network is None:
            return
        self.optimizers = {"prior": build_adam(prior.network.parameters(), optim.lr, optim)}
        self.trained = accelerator.prepare(prior)
        self.update = Updater(accelerator, self.trained, self.optimizers["prior"], trainer.clip)
        if trainer.ema:
            self.averages = {"prior": Ema(prior, trainer.ema, trainer.ema_warmup)}
        prior.train()

    def _embed(self, rows: np.ndarray) -> Tensor:
        """y of these scans, (N, dim): read from embeddings.csv in the stage's folder, or computed and stored there."""
        encoder, device = self.encoder.to(self.accelerator.device), self.accelerator.device
        digests = self.cohort.digest_views()[rows].tobytes().hex()
        table = self.cohort.table.iloc[rows].reset_index(drop=True)

        def compute() -> np.ndarray:
            return embed_rows(
                lambda x: encoder(x.to(device)), lambda part: self.cohort.views.batch(rows[part]), len(rows), BATCH
            )

        if not self.accelerator.is_main_process:
            return torch.from_numpy(compute())
        key = embeddings_key(table, self.encoder_sha256, digests)
        return torch.from_numpy(load_or_compute_embeddings(self.folder / "embeddings.csv", table, key, compute))

    def _subject_weights(self, rows: np.ndarray) -> Tensor:
        """Weight of each scan, (N,) float32, which add up to 1: all subjects have the same."""
        subjects = self.cohort.table["subject"].iloc[rows]
        counts = subjects.map(subjects.value_counts()).to_numpy(np.float64)
        return torch.from_numpy((1 / counts / (1 / counts).sum()).astype(np.float32))

    def fetch(self, index: np.ndarray, position: np.ndarray, number: int) -> Batch:
        """Numbers of the training scans, and the random draws for them."""
        width, columns = self.u.shape[1], len(self.columns)
        noise = draw_normal((width + 2 + columns,), self.seed, position, "train/prior")
        uniform = torch.special.ndtr(noise[:, width:])  # (B, 2 + C)
        dropped = (uniform[:, 1:2] < self.drop_labels) | (uniform[:, 2:] < self.drop_labels)
        labels = self.labels[self.train_rows[index]]
        return {
            "sample": torch.from_numpy(np.asarray(index)),  # (B,)
            "labels": torch.where(dropped, torch.nan, labels),  # (B, C)
            "noise": noise[:, :width].contiguous(),  # (B, k)
            "t": self._timesteps(uniform[:, 0]),  # (B,)
        }

    def _timesteps(self, uniform: Tensor) -> Tensor:
        timesteps = self.modules["prior"].schedule.timesteps
        return (uniform * timesteps).long().clamp(max=timesteps - 1)

    def run_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """Update the network and its moving average."""
        return self.take_step(step, (self.update, self.update.accumulate(micro_batches, self._loss)))

    def _loss(self, batch: Batch) -> dict[str, Tensor]:
        batch = batch_to_device(batch, self.accelerator.device)
        errors = self._errors(self.trained, self.u[batch["sample"]], batch)
        weights = self.sample_weights[batch["sample"]] * self.num_samples  # 1 on average
        return {"loss": (weights * errors).mean()}

    def _errors(self, network: nn.Module, u: Tensor, batch: Batch) -> Tensor:
        """|v - v_prior|^2 of each scan, mean over the directions that exist, (B,)."""
        schedule, t, noise = self.modules["prior"].schedule, batch["t"], batch["noise"]
        alpha, sigma = (level(t).to(u)[:, None] for level in (schedule.alpha, schedule.sigma))
        v = network(add_noise(schedule, u, noise, t), t, batch["labels"])
        squared = (v.float() - (alpha * noise - sigma * u)).square()
        return (squared * self.exists).sum(1) / self.exists.sum()

    def validate(self) -> dict[str, float]:
        """Loss on the validation scans with fixed noise: of the prior, of its Gaussian part, and of N(0, I).

        Only if `loss` is below `loss_gaussian` has the network learned what holds for other people.
        """
        count = len(self.validation_rows)
        if not count:
            return {}
        prior: SemanticPrior = self.modules["prior"]
        keys = [int(self.validation_rows[row]) * LEVELS + level for level in range(LEVELS) for row in range(count)]
        rows = np.tile(np.arange(count), LEVELS)
        device = self.accelerator.device
        level = torch.arange(LEVELS).repeat_interleave(count)
        batch = {
            "labels": self.labels[self.validation_rows[rows]],
            "noise": draw_normal((self.u.shape[1],), self.seed, keys, "validation/prior"),
            "t": self._timesteps((level + 0.5) / LEVELS),
        }
        batch, u = batch_to_device(batch, device), self.u[self.num_samples :][rows]
        weights = self._subject_weights(self.validation_rows).to(device)[rows] / LEVELS
        networks = {
            "loss": prior,
            "loss_gaussian": lambda u_t, t, labels: prior.predict_gaussian_v(u_t, t, prior.coding(labels)),
            "loss_standard": lambda u_t, t, labels: torch.zeros_like(u_t),
        }
        errors = {name: self._errors(network, u, batch) for name, network in networks.items()}
        return {name: float((weights * error).sum()) for name, error in errors.items()}

    def metadata(self) -> dict[str, Any]:
        """The encoder whose y this is the distribution of, and the columns it is conditioned on."""
        return {"encoder_sha256": self.encoder_sha256, "columns": self.column_entries}


def _check_same_data(run: Run, cohort: Cohort, workspace: Workspace) -> None:
    """Refuse a stage 3 that was trained on another split, transform or view."""
    refuse_other_split(run, cohort, workspace)
    if run.metadata["transform"] != cohort.transform.key() or run.metadata.get("view") != cohort.view_key:
        raise UserError(f"{run.path} was trained on other volumes or views of the scans: keep the same data.* values")
