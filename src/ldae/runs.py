"""Run directories: `runs/<name>/<stage>/`, their stored config, and modules rebuilt from it, strictly.

config.yaml  metrics.jsonl  tensorboard/  state/ (resume)  weights/*.safetensors + metadata.json (publish)
"""

import errno
import hashlib
import re
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

from ldae.models.state import check_depth, check_tensors, load_strictly, read_tensors
from ldae.utils.errors import UserError
from ldae.utils.files import file_sha256, read_json, replacing, write_json, write_text
from ldae.utils.renamed import with_present_names

MAX_BRACKETS = 500  # in a stored config
MAX_NAME = 200  # file names end at 255 bytes


@dataclass(frozen=True)
class Workspace:
    """All stages of one experiment: `runs/<name>`. A sweep's jobs are variants of a stage beside each other."""

    root: Path
    variant: str = ""

    @property
    def split_file(self) -> Path:
        """The split by subject, written once, read by every stage."""
        return self.root / "split.csv"

    @property
    def latents(self) -> Path:
        """Where encode_latents.py writes; a sweep's jobs all read the same."""
        return self.root / "latents"

    @property
    def evaluation(self) -> Path:
        """Where evaluate.py writes."""
        return self.root / f"evaluation{self.variant}"

    def stage(self, name: str) -> "Run":
        """The run that this process writes for stage `name`."""
        return Run(self.root / f"{name}{self.variant}")

    def predecessor(self, name: str, path: str | None = None) -> "Run":
        """The finished run of an earlier stage: a sibling under the same name, or at `path`."""
        run = Run(Path(path) if path else self.root / name)
        if not run.published:
            raise UserError(
                f"no trained '{name}' at {run.path}: run `python train.py stage={name} name={self.root.name}` first, "
                f"or give its path with stage.{name}=PATH"
            )
        return run


def open_workspace(config: DictConfig) -> Workspace:
    """The workspace of a composed config; in a Hydra sweep, with the job's overrides as variant."""
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
    """Write tensors atomically as safetensors, on the CPU and contiguous, with text for the file's header.

    Raises:
        OSError: they cannot be written.
    """
    with replacing(path) as temporary:
        try:
            save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, header)
        except SafetensorError as error:  # it holds the reason as text alone
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


@dataclass(frozen=True)
class Run:
    """One stage's directory."""

    path: Path

    @property
    def weights(self) -> Path:
        """Published weights."""
        return self.path / "weights"

    @property
    def published(self) -> bool:
        """Whether the stage has left weights for others."""
        return (self.weights / "metadata.json").exists()

    @property
    def config(self) -> DictConfig:
        """The config the run was made with.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.path / "config.yaml"
        try:
            text = path.read_text(encoding="utf-8")
            if max(map(text.count, "[{")) > MAX_BRACKETS:  # the parser's time grows with their square
                raise ValueError("too many brackets")
            if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
                raise ValueError("an alias, which may hold itself")
            stored = OmegaConf.to_container(OmegaConf.create(text))
            loaded = OmegaConf.create(with_present_names(stored))
        except (OSError, yaml.YAMLError, UnicodeError, OmegaConfBaseException, ValueError, RecursionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"cannot read {path} ({reason}): restore it") from error
        if not isinstance(loaded, DictConfig) or not isinstance(loaded.get("model"), DictConfig):
            raise UserError(f"{path} holds no config: restore it")
        return loaded

    @property
    def metadata(self) -> dict[str, Any]:
        """What `publish` wrote: step, metrics, split hash, and the files' hashes.

        Raises:
            UserError: it is damaged.
        """
        path = self.weights / "metadata.json"
        try:
            found = read_json(path)
            if not all(isinstance(entry["sha256"], str) for entry in found["weights"].values()):
                raise ValueError("no hashes")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error}): run the stage's training command again") from error
        return found

    def write_config(self, config: DictConfig) -> None:
        """Store the resolved config."""
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(config, resolve=True))

    def publish(self, modules: dict[str, dict[str, Tensor]], metadata: dict[str, Any]) -> None:
        """Write each module's tensors, then the metadata that makes them count."""
        files = {}
        for name, tensors in modules.items():
            path = self.weights / f"{name}.safetensors"
            save_tensors(path, tensors)
            files[name] = {"file": path.name, "sha256": file_sha256(path)}
        write_json(self.weights / "metadata.json", {**metadata, "weights": files})

    def sha256(self, name: str) -> str:
        """Hash of a published module's file."""
        return self.metadata["weights"][name]["sha256"]

    def weights_file(self, name: str) -> Path:
        """The published file of a module, unaltered.

        Raises:
            UserError: there is none, or it is not the one that was published.
        """
        path = self.weights / f"{name}.safetensors"
        if name not in self.metadata["weights"]:
            raise UserError(f"{self.path} holds no weights of '{name}'")
        if not path.is_file() or file_sha256(path) != self.sha256(name):
            raise UserError(f"{path} is not the file that was published: run the stage's training command again")
        return path

    def module(self, name: str, node: Any) -> nn.Module:
        """Build a module from its config node and load its published weights, strictly; eval mode, frozen."""
        return load_module(node, self.weights_file(name), self.path / "config.yaml")


def load_module(node: Any, file: Path, where: Path) -> nn.Module:
    """The network that `node` describes with the weights of `file`, on the CPU, frozen, in eval mode.

    Its random start is never computed, and nothing is made before sizes are known to fit the file's.

    Raises:
        UserError: the two do not fit; `where` is named as what describes the network.
    """
    tensors = read_tensors(file)
    check_depth(node, tensors, file)
    with torch.device("meta"):
        module = build_stored(node, str(where))
    if not isinstance(module, nn.Module):
        raise UserError(f"{where} describes no network for {file.name}: restore it")
    check_tensors({name: tensor.shape for name, tensor in module.state_dict().items()}, tensors, file)
    constants = [buffer for name, buffer in module.named_buffers() if name not in module.state_dict()]
    if any(buffer.is_meta for buffer in constants):  # somebody's own network: no file holds these
        module = build_stored(node, str(where))
    load_strictly(module, tensors, file, assign=True)
    return module.eval().requires_grad_(False)


def build_stored(node: Any, where: str) -> Any:
    """What a stored config describes.

    Raises:
        UserError: its class does not take these arguments.
    """
    try:
        return instantiate(node)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where} describes what cannot be built ({reason}): restore it") from error


def estimator_node(unet: DictConfig, semantic_dim: int, options: DictConfig | None = None) -> dict[str, Any]:
    """The gradient estimator's config: the U-Net's own, so that no architecture is typed twice, and its `options`."""
    node = {**OmegaConf.to_container(unet, resolve=True), **(options or {})}
    target = "ldae.models.gradient_estimator.GradientEstimator"
    return {**node, "_target_": target, "semantic_dim": semantic_dim}


def to_container(node: Any) -> dict[str, Any]:
    """A config node as plain values, without the files that training started from: the weights are in the bundle."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            kept = {key: cleaned(item) for key, item in value.items()}
            return {**kept, "weights": None} if kept.get("weights") else kept
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    return cleaned(node if isinstance(node, dict) else OmegaConf.to_container(node, resolve=True))
