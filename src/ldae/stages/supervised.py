"""The supervised twin of y: the same semantic encoder with a linear head, trained on one label (arXiv 2504.08635, the
table of probes: "supervised, same encoder").

    minimise  cross-entropy of head(Enc(x)) against a class, or  (head(Enc(x)) - (label - mean) / std)^2  of a number

It is a baseline, not a part of the method: `evaluation=[probes]` scores its own predictions beside the probes of y as
`baseline/supervised`. Only labels of the training split are learned from; those of the validation split choose the
weights that are kept and end the training early. What "the same encoder" means for one of principal components, in
which nothing is trained: ldae.models.supervised_network.
"""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from omegaconf import DictConfig
from torch import Tensor, nn

from ldae.config import Optim, TrainerSettings
from ldae.data.cohort import Cohort
from ldae.data.stream import Batch
from ldae.data.subsampling import subsample_by_subject
from ldae.data.table import scan_names
from ldae.models.placement import place_module
from ldae.models.state import load_weights
from ldae.models.supervised_network import SupervisedNetwork
from ldae.runs import Workspace, supervised_folder
from ldae.stages.fit_encoder import fit_encoder
from ldae.stages.tasks import Task
from ldae.training.device import batch_to_device, load_volumes, uses_channels_last
from ldae.training.ema import Ema
from ldae.training.optimizer_step import StepResult, Updater, build_adam
from ldae.training.stage import Monitor, Stage
from ldae.training.step_graph import can_record
from ldae.training.validation import mean_over_scans, shard_rows
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

FEW = 10  # validation scans below which it is said that they are few


class SupervisedStage(Stage):
    """Trains encoder and head and publishes those with the lowest loss on the validation scans.

    Args:
        encoder: semantic encoder, from the view of a scan (B, C, X, Y, Z) to y (B, dim).
        task: the label.
        initial_weights: folder with encoder.safetensors to start from, such as `repr/weights` of a run with the same
            encoder; what it has measured on its training scans is then kept. None: as stage 3 starts.

    Raises:
        UserError: training or validation scans have too few labels.
    """

    name = "supervised"
    reads_views = True
    harmless_on_resume = ("initial_weights", "encoder.channels", "encoder.backbone.channels",
                          "encoder.backbone.in_channels")  # fmt: skip
    monitor = Monitor("loss", higher_is_better=False)
    published = ("network",)

    def __init__(
        self, encoder: nn.Module, task: Task, initial_weights: str | None, cohort: Cohort, workspace: Workspace
    ) -> None:
        self.task, self.cohort = task, cohort
        self.truth = task.probe.target(cohort.table)  # (N,), NaN without a label
        self.train_rows, self.all_validation_rows = self._labelled_rows("train"), self._labelled_rows("val")
        self._refuse_too_few_labels()
        network = SupervisedNetwork(encoder)
        self.is_fitted = initial_weights is not None
        if initial_weights is not None:
            load_weights(network.encoder, Path(initial_weights) / "encoder.safetensors")
        self.modules = {"network": network}
        self.checkpoints = workspace.stage(supervised_folder(task.name)).path / "state"
        self.num_samples = len(self.train_rows)
        self.sample_names = scan_names(cohort.table, self.train_rows)

    @classmethod
    def folder(cls, node: DictConfig) -> str:
        """`supervised/<task>`, so that several tasks lie side by side."""
        return supervised_folder(str(node.task.name))

    def _labelled_rows(self, split: str) -> np.ndarray:
        rows = self.cohort.rows(split)
        return rows[np.isfinite(self.truth[rows])]

    def _refuse_too_few_labels(self) -> None:
        table, task = self.cohort.table, self.task
        subjects = table["subject"].to_numpy(str)
        for split, rows, fitting in (("train", self.train_rows, True), ("val", self.all_validation_rows, False)):
            reason = task.probe.reason_unusable(self.truth[rows], subjects[rows], fitting)
            if reason:
                raise UserError(
                    f"stage=supervised task={task.name}: the {split} split has {reason}; take another task.column, or "
                    f"give data.split.{split} a larger share under another name=..."
                )
        if len(self.all_validation_rows) < FEW:
            log.warning(
                "only %d validation scans have a label: which weights are kept is largely chance",
                len(self.all_validation_rows),
            )

    def prepare(self, accelerator: Accelerator, trainer: TrainerSettings, optim: Optim, seed: int) -> None:
        """See Stage."""
        self.accelerator, self.seed = accelerator, seed
        subjects = self.cohort.table["subject"].tolist()
        self.validation_rows = subsample_by_subject(self.all_validation_rows, subjects, trainer.validation_scans, seed)
        network = self.modules["network"]
        place_module(network, accelerator.device, uses_channels_last(trainer, accelerator))
        self.task.fit(network, self.truth[self.train_rows])
        # A checkpoint contains what was measured at the start.
        if not self.is_fitted and not any(self.checkpoints.glob("step_*.json")):
            fit_encoder(network.encoder, self.cohort.views, self.cohort.rows("train"), accelerator, seed)
        network.encoder.checkpointing = trainer.checkpointing
        rates = {network.encoder: optim.lr if optim.encoder_lr is None else optim.encoder_lr, network.head: optim.lr}
        groups = [{"params": list(module.parameters()), "lr": rate} for module, rate in rates.items()]
        optimizer = build_adam(groups, optim.lr, optim)
        self.optimizers = {"network": optimizer}
        self.network = accelerator.prepare(torch.compile(network) if trainer.compile else network)
        record = can_record(trainer, accelerator)
        self.update = Updater(accelerator, self.network, optimizer, trainer.clip, record)
        self.averages = {"network": Ema(network, trainer.ema, trainer.ema_warmup)} if trainer.ema else {}
        network.train()

    def fetch(self, index: np.ndarray, position: np.ndarray, number: int) -> Batch:
        """Views as stored, their labels, and what is drawn for their augmentation."""
        rows = self.train_rows[index]
        return {
            "x": self.cohort.views.read_stored(rows),  # (B, C, X, Y, Z)
            "truth": torch.from_numpy(self.truth[rows].astype(np.float32)),  # (B,)
            **self.cohort.draw_view_augmentation(self.seed, position),
        }

    def run_step(self, micro_batches: Sequence[Batch], step: int) -> StepResult:
        """Update encoder and head, and their moving average."""
        return self.take_step(step, (self.update, self.update.accumulate(micro_batches, self._loss)))

    def _loss(self, batch: Batch) -> dict[str, Tensor]:
        """The loss, mean over the micro-batch."""
        batch = batch_to_device(batch, self.accelerator.device)
        output = self.network(self.cohort.augment(self.cohort.views.decode(batch["x"]), batch))  # (B,)
        return {"loss": self.task.losses(self.modules["network"], output, batch["truth"]).mean()}

    def validate(self) -> dict[str, float]:
        """Loss, and accuracy or mean absolute error, on the labelled validation scans."""
        network, device = self.modules["network"], self.accelerator.device
        metrics: dict[int, dict[str, Tensor]] = {}
        for row in shard_rows(self.validation_rows, self.accelerator):
            x = load_volumes(self.cohort.views, np.array([row]), device)
            truth = torch.tensor([self.truth[row]], dtype=torch.float32, device=device)
            with self.accelerator.autocast():
                output = network(x)
            found = {"loss": self.task.losses(network, output, truth), **self.task.measures(network, output, truth)}
            metrics[int(row)] = found
        return mean_over_scans(metrics, self.accelerator)

    def metadata(self) -> dict[str, Any]:
        """The task, and a digest of the labels that were learned from or chosen by."""
        rows = np.concatenate([self.train_rows, self.all_validation_rows])
        labels = hashlib.sha256(np.ascontiguousarray(self.truth[rows], np.float64).tobytes()).hexdigest()
        counts = {"train": len(self.train_rows), "val": len(self.all_validation_rows)}
        return {"task": self.task.describe(), "labels": labels, "labelled scans": counts}
