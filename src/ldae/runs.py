"""Run directories, `runs/<name>/<stage>/`: their stored config, and the modules that are rebuilt from it.

config.yaml                             the resolved config
metrics.jsonl, tensorboard/             scalars and pictures
state/                                  checkpoints to resume from
progress.json                           step, seconds of training, and whether it is finished
weights/*.safetensors, metadata.json    what is published: the weights for later stages and users
"""

import errno
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ldae.data.splits import hash_split, read_split
from ldae.models.state import check_tensors, load_strictly, read_tensors
from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256, read_json, replacing, write_json, write_text
from ldae.utils.renamed import with_present_names

MAX_NAME = 200  # of a folder; file systems allow 255 bytes
PROGRESS = "progress.json"

Node = DictConfig | dict[str, Any]  # a config that describes an object by its `_target_`


@dataclass(frozen=True)
class Workspace:
    """The runs of all stages of one experiment, `runs/<name>`.

    Attributes:
        root: `runs/<name>`.
        variant: suffix of the folders that this process writes: the jobs of a sweep are variants of a stage.
    """

    root: Path
    variant: str = ""

    @property
    def split_file(self) -> Path:
        """The split by subject, which is stored once and read by every stage."""
        return self.root / "split.csv"

    def split_hash(self) -> str | None:
        """Hash of the stored split; None if none has been drawn yet.

        Raises:
            UserError: the file is damaged.
        """
        return hash_split(read_split(self.split_file)) if self.split_file.exists() else None

    @property
    def latents(self) -> Path:
        """The folder that encode_latents.py writes. All jobs of a sweep read the same one."""
        return self.root / "latents"

    @property
    def evaluation(self) -> Path:
        """The folder that evaluate.py writes."""
        return self.root / f"evaluation{self.variant}"

    def stage(self, name: str) -> "Run":
        """The run that this process writes for stage `name`."""
        return Run(self.root / f"{name}{self.variant}")

    def has(self, name: str) -> bool:
        """Whether stage `name` of this experiment has published weights."""
        return Run(self.root / name).published

    def predecessor(self, name: str, path: str | None = None) -> "Run":
        """The finished run of an earlier stage: the sibling under the same name, or the one at `path`.

        Raises:
            UserError: it has not published weights.
        """
        run = Run(Path(path) if path else self.root / name)
        if not run.published:
            raise UserError(
                f"no trained '{name}' at {run.path}: run `python train.py stage={name} name={self.root.name}` first, "
                f"or give its path with stage.{name}=PATH"
            )
        return run


def supervised_folder(task: str) -> str:
    """Folder below `runs/<name>` of the supervised network of a task."""
    return f"supervised/{task}"


def open_workspace(config: DictConfig) -> Workspace:
    """The workspace of a composed config. In a Hydra sweep the variant is named after the overrides of the job."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    root = Path(config.paths.runs) / config.name
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return Workspace(root)
    name = HydraConfig.get().job.override_dirname.replace("/", "_")
    if len(name) > MAX_NAME:
        name = hashlib.sha256(name.encode()).hexdigest()[:16]
    return Workspace(root, f"@{name}" if name else "")


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> None:
    """Write tensors of any device and layout atomically as a safetensors file.

    Args:
        header: text to store in the file's header.

    Raises:
        OSError: they cannot be written.
    """
    with replacing(path) as temporary:
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, header)
        except SafetensorError as error:  # gives the system's error number as text only
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


@dataclass(frozen=True)
class Run:
    """The directory of one stage."""

    path: Path

    @property
    def weights(self) -> Path:
        """Folder of the published weights."""
        return self.path / "weights"

    @property
    def published(self) -> bool:
        """Whether the stage has published weights."""
        return (self.weights / "metadata.json").exists()

    @property
    def config(self) -> DictConfig:
        """The config of the run, with the present names of classes and arguments that have been renamed.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.path / "config.yaml"
        try:
            stored = OmegaConf.to_container(OmegaConf.load(path))
            loaded = OmegaConf.create(with_present_names(stored))
        except (OSError, yaml.YAMLError, UnicodeError, OmegaConfBaseException, ValueError, RecursionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot read {path} ({reason}): restore it") from error
        if not isinstance(loaded, DictConfig) or not isinstance(loaded.get("model"), DictConfig):
            raise UserError(f"{path} is not the config of a run: restore it")
        return loaded

    @property
    def metadata(self) -> dict[str, Any]:
        """What was published with the weights: step, metrics, split hash, and the hashes of the files.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.weights / "metadata.json"
        try:
            found = read_json(path)
            if not all(isinstance(entry["sha256"], str) for entry in found["weights"].values()):
                raise ValueError("a file without a hash")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): run the stage's training command again") from error
        return found

    @property
    def progress(self) -> dict[str, Any]:
        """How far training is: `step`, `seconds` of the wall clock over all resumptions, and `finished`.

        Empty if an earlier version of this project trained the stage, or if the file is damaged.
        """
        try:
            found = read_json(self.path / PROGRESS)
            return {"step": int(found["step"]), "seconds": float(found["seconds"]), "finished": bool(found["finished"])}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def write_config(self, config: DictConfig) -> None:
        """Store the resolved config."""
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(config, resolve=True))

    def publish(self, modules: dict[str, dict[str, Tensor]], metadata: dict[str, Any]) -> None:
        """Write the tensors of each module, and last the metadata, with which the weights count as published."""
        files = {}
        for name, tensors in modules.items():
            path = self.weights / f"{name}.safetensors"
            save_tensors(path, tensors)
            files[name] = {"file": path.name, "sha256": file_sha256(path)}
        write_json(self.weights / "metadata.json", {**metadata, "weights": files})

    def sha256(self, name: str) -> str:
        """Hash of the published file of a module."""
        return self.metadata["weights"][name]["sha256"]

    def weights_file(self, name: str) -> Path:
        """The published file of a module, whose hash is compared.

        Raises:
            UserError: there is none, or it is not the one that was published.
        """
        path = self.weights / f"{name}.safetensors"
        if name not in self.metadata["weights"]:
            raise UserError(f"{self.path} has no weights of '{name}'")
        if not path.is_file() or file_sha256(path) != self.sha256(name):
            raise UserError(f"{path} is not the file that was published: run the stage's training command again")
        return path

    def module(self, name: str, node: Node) -> nn.Module:
        """Build a module from its config and load its published weights; see `load_module`."""
        return load_module(node, self.weights_file(name), self.path / "config.yaml")


def load_module(node: Node, file: Path, where: Path) -> nn.Module:
    """The network that `node` describes, with the weights of `file` loaded strictly; on the CPU, frozen, in eval mode.

    The network is built without memory first. Its initial weights are never computed, and nothing is allocated before
    the sizes are known to match those of the file.

    Args:
        where: the file that `node` is from, for error messages.

    Raises:
        UserError: the description and the weights do not match.
    """
    tensors = read_tensors(file)
    with torch.device("meta"):
        module = build_stored(node, str(where))
    if not isinstance(module, nn.Module):
        raise UserError(f"{where} describes no network for {file.name}: restore it")
    check_tensors({name: tensor.shape for name, tensor in module.state_dict().items()}, tensors, file)
    constants = [buffer for name, buffer in module.named_buffers() if name not in module.state_dict()]
    if any(buffer.is_meta for buffer in constants):  # a user's own network: the file does not contain these buffers
        module = build_stored(node, str(where))
    load_strictly(module, tensors, file, assign=True)
    return module.eval().requires_grad_(False)


def build_stored(node: Node, where: str) -> Any:
    """Build what a stored config describes.

    Args:
        where: the file that `node` is from, for error messages.

    Raises:
        UserError: it cannot be built.
    """
    try:
        return instantiate(node)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where} describes what cannot be built ({reason}): restore it") from error


def estimator_node(unet: DictConfig, semantic_dim: int, options: DictConfig | None = None) -> dict[str, Any]:
    """Config of the gradient estimator: the architecture is the U-Net's, `options` are what it does not share."""
    node = {**OmegaConf.to_container(unet, resolve=True), **(options or {})}
    target = "ldae.models.gradient_estimator.GradientEstimator"
    return {**node, "_target_": target, "semantic_dim": semantic_dim}


def prior_node(settings: DictConfig, semantic_dim: int, columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Config of the semantic prior: `settings`, and what depends on the encoder and the table (ldae.prior.columns)."""
    node = to_container(settings)
    return {**node, "_target_": "ldae.prior.semantic_prior.SemanticPrior", "dim": semantic_dim, "columns": [*columns]}


def to_container(node: Node) -> dict[str, Any]:
    """A config as plain values, without the paths of files that training started from."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {key: cleaned(item) for key, item in value.items()}
            return {**kept, "weights": None} if kept.get("weights") else kept
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    return cleaned(node if isinstance(node, dict) else OmegaConf.to_container(node, resolve=True))
