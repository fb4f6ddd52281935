"""What a supervised network is trained for (`conf/task/*.yaml`): a class or a number in a column of the table.

Labels are read as the probes read them (ldae.evaluation.probes.targets), so that both predict the same thing.
"""

import re
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ldae.evaluation.probes.targets import Classification, Probe, Regression
from ldae.models.supervised_network import SupervisedNetwork
from ldae.utils.errors import UserError

USABLE_NAME = re.compile(r"\w[\w.-]*")


def check_name(name: str) -> str:
    """The name of a task, which is also that of a folder.

    Raises:
        UserError: it cannot be one.
    """
    if not USABLE_NAME.fullmatch(name):
        raise UserError(f"task.name={name}: letters, digits, '.', '-' and '_' are needed")
    return name


class Task(ABC):
    """A label to predict.

    Attributes:
        name: of the folder `runs/<name>/supervised/<task>`, and of the probe beside which it is scored.
        probe: reads the label.
    """

    name: str
    probe: Probe

    @abstractmethod
    def fit(self, network: SupervisedNetwork, truth: np.ndarray) -> None:
        """Measure on the labels of the training scans, (N,), what the loss and the head need: weights or a scale."""

    @abstractmethod
    def losses(self, network: SupervisedNetwork, output: Tensor, truth: Tensor) -> Tensor:
        """Loss of each scan, (B,).

        Args:
            output: what the network returned, (B,).
            truth: labels in their own unit, (B,).
        """

    @abstractmethod
    def measures(self, network: SupervisedNetwork, output: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """What validation logs besides the loss, (B,) each."""

    def describe(self) -> dict[str, object]:
        """What the label is, for the metadata of the weights."""
        classes = self.probe.classes
        return {"name": self.name, "column": self.probe.column, "classes": None if classes is None else list(classes)}


class ClassTask(Task):
    """`positive` against `negative` in a column; scans with other values are not used. Cross-entropy.

    Args:
        balanced: whether both classes have the same weight in the loss, whatever their numbers of training scans.
    """

    def __init__(self, name: str, column: str, positive: str, negative: str, balanced: bool = False) -> None:
        self.name, self.balanced = check_name(name), balanced
        self.probe = Classification(column, positive, negative)
        self.class_weights = (1.0, 1.0)

    def fit(self, network: SupervisedNetwork, truth: np.ndarray) -> None:
        """Weights of the classes: their mean over the training scans is 1."""
        if self.balanced:
            self.class_weights = tuple(len(truth) / (2 * np.sum(truth == value)) for value in (0, 1))

    def losses(self, network: SupervisedNetwork, output: Tensor, truth: Tensor) -> Tensor:
        """See Task."""
        negative, positive = self.class_weights
        weights = negative + (positive - negative) * truth
        return weights * functional.binary_cross_entropy_with_logits(output, truth, reduction="none")

    def measures(self, network: SupervisedNetwork, output: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """The share of scans that are classified correctly."""
        return {"accuracy": ((output >= 0) == (truth == 1)).float()}


class NumberTask(Task):
    """A numeric column; scans without a value are not used. Squared error of the number, standardised on train."""

    def __init__(self, name: str, column: str) -> None:
        self.name, self.probe = check_name(name), Regression(column)

    def fit(self, network: SupervisedNetwork, truth: np.ndarray) -> None:
        """Mean and standard deviation over the training scans."""
        network.set_label_scale(float(truth.mean()), float(truth.std()))

    def losses(self, network: SupervisedNetwork, output: Tensor, truth: Tensor) -> Tensor:
        """See Task."""
        return (output - (truth - network.mean) / network.std).square()

    def measures(self, network: SupervisedNetwork, output: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """The absolute error in the unit of the column."""
        return {"mae": torch.abs(network.mean + network.std * output - truth)}
