"""The supervised networks of a run (stage=supervised), scored beside the probes of y as `baseline/supervised`.

A network belongs to the probe of its name, if both have the same column and classes. It predicts with its own head:
nothing is fitted here, in its own cohort or in another one.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from ldae.data.cohort import Cohort
from ldae.evaluation.embeddings import embed_cohort
from ldae.evaluation.other_cohort import file_prefix
from ldae.evaluation.probes.fitted_predictors import KnownPredictions
from ldae.evaluation.probes.targets import Probe
from ldae.models.placement import place_module
from ldae.runs import Run, Workspace, supervised_folder, to_container
from ldae.utils.errors import UserError


@dataclass(frozen=True)
class SupervisedTwins:
    """The supervised networks of a run, as predictors of the scans of a cohort.

    Attributes:
        space: the run.
        cohort: whose scans are predicted.
        prefix: of the metrics of another cohort, such as "external/"; "" for the run's own.
        device: on which the networks compute.
        batch_size: scans at a time.
    """

    space: Workspace
    cohort: Cohort
    prefix: str
    device: torch.device
    batch_size: int

    def run(self, name: str) -> Run:
        """The run of the network for the probe `name`, whether it exists or not."""
        return Run(self.space.root / supervised_folder(name))

    def reason_absent(self, name: str, probe: Probe) -> str | None:
        """Reason why there is no network for the probe `name`, or None if there is one."""
        run = self.run(name)
        again = f"`python train.py stage=supervised task={name} name={self.space.root.name} ...`"
        if not run.published:
            return f"{run.path} has no trained network, {again} trains it"
        if run.progress and not run.progress["finished"]:
            return f"the training in {run.path} is not finished, {again} resumes it"
        task = run.metadata["task"]
        classes = None if probe.classes is None else list(probe.classes)
        if (task["column"], task["classes"]) != (probe.column, classes):
            return (
                f"{run.path} was trained for {_describe(task['column'], task['classes'])}, and the probe predicts "
                f"{_describe(probe.column, classes)}"
            )
        return None

    def refuse_unfit(self, names: Iterable[str]) -> None:
        """Refuse networks for these probes that were trained on another split, or on other volumes or views.

        Raises:
            UserError: says which, and what to do.
        """
        for run in (run for run in map(self.run, names) if run.published):
            remedy = "train it again, or remove its folder to evaluate without it"
            if not self._accepts_split(run.metadata["split_hash"]):
                raise UserError(f"{run.path} was trained on another split of the subjects than y: {remedy}")
            if run.metadata["transform"] != self.cohort.transform.key():
                raise UserError(f"{run.path} was trained on volumes of another transform than y: {remedy}")
            if run.metadata.get("view") != self.cohort.view_key:
                raise UserError(f"{run.path} was trained with another view of the scans than y: {remedy}")

    def _accepts_split(self, split_hash: str) -> bool:
        """Whether a network that was trained with this split has seen no test subject of y."""
        if not self.prefix:
            return self.cohort.accepts_split(split_hash)
        # Subjects of another cohort are in no split of the run.
        return split_hash in (self.space.predecessor("repr").metadata["split_hash"], self.space.split_hash())

    def predictor(self, name: str, probe: Probe) -> KnownPredictions:
        """The network for the probe `name` as a predictor of every scan; predictions are stored like embeddings."""
        run = self.run(name)
        encoder = to_container(run.config.stage.encoder)
        node = {"_target_": "ldae.models.supervised_network.SupervisedNetwork", "encoder": encoder}
        file = self.space.evaluation / f"{file_prefix(self.prefix)}supervised_{name}.csv"

        def predict(view: Tensor) -> Tensor:
            return network.decision(view.to(self.device))[:, None]

        network = place_module(run.module("network", node), self.device)
        decision = embed_cohort(file, run.sha256("network"), predict, self.cohort, self.batch_size)[:, 0]
        values = np.asarray(decision, np.float64)
        return KnownPredictions(values if probe.classes is None else expit(values))


def _describe(column: str, classes: Iterable[str] | None) -> str:
    return column if classes is None else f"{column}, {' or '.join(classes)}"
