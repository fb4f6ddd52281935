"""Dataclass schemas of the fixed config groups, and the checks that run before any expensive work.

Hydra merges every YAML file and override into these dataclasses, so a mistyped key fails at compose with its full name.
Groups that choose a class (`_target_`) are checked against that class's constructor by `check_targets`.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.utils import get_object
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from ldae.data.phantom import SHAPE, SPACING
from ldae.utils.errors import UserError
from ldae.utils.renamed import present_name

# What a required file is, and how to do without it on purpose.
REQUIRED_FILES = {
    "perceptual.backbone": "torchvision's SqueezeNet 1.1 weights (perceptual=none: no perceptual term)",
    "perceptual.heads": "the linear heads of LPIPS 0.1 for SqueezeNet (perceptual=none: no perceptual term)",
    "perceptual.weights": "a MedicalNet checkpoint (perceptual=none: no perceptual term)",
    "stage.initial_weights": "weights of an AutoencoderKL to start from (stage.initial_weights=null: random weights)",
    "model.encoder.backbone.weights": (
        "torchvision's ImageNet weights of ConvNeXt-Small (model.encoder.backbone.weights=null: random weights)"
    ),
}
_INSTANTIATE_KEYS = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}


@dataclass
class Paths:
    """Where things live, relative to the working directory."""

    runs: str = "runs"
    data: str = "data"
    cache: str = "data/cache"


@dataclass
class TrainerSettings:
    """The loop. Steps are optimiser steps; `max_epochs` is converted to them."""

    max_steps: int | None = None
    max_epochs: float | None = None
    batch_size: int = 4
    accumulate: int = 1
    clip: float | None = 1.0
    ema: float | None = 0.999  # decay of the weights' moving average; None: no average
    ema_warmup: bool = True  # a smaller decay in the first steps, so that the average forgets the initial weights
    log_every: int = 50
    validate_every: int | None = 500
    validate_every_epochs: float | None = None  # in place of validate_every
    preview_every: int | None = None
    checkpoint_every: int = 500
    keep_states: int = 2
    patience: int | None = None  # validations without improvement
    validation_scans: int | None = None
    channels_last: bool | None = None  # layout of convolutions; None: where it was measured to be faster
    checkpointing: bool = False
    compile: bool = False
    workers: int | None = None
    max_skipped: int = 10  # steps in a row without a finite loss and gradient
    accept_changes: bool = False  # resume although the data, the predecessors or the config are others


@dataclass
class Optim:
    """Adam, its learning rates, and the factor by which they change over the run."""

    lr: float = 1e-4
    discriminator_lr: float = 1e-4
    encoder_lr: float | None = None  # of the semantic encoder; None: lr
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    warmup_steps: int = 0
    final_factor: float = 1.0  # the factor at the last step of a half-cosine decay; 1 = constant


@dataclass
class Loss:
    """Weights of stage 1's loss beside L1, the step from which the discriminator plays along; stage 3's draws of t
    and of the visit that y explains."""

    kl_weight: float = 1e-7
    ssim_weight: float = 0.0  # of 1 - SSIM; published: none
    perceptual_weight: float = 1e-3
    adversarial_weight: float = 0.025
    adversarial_start: int = 0
    time_power: float = 1.0
    other_visit: float = 0.0


@dataclass
class Split:
    """Shares of subjects, and the seed of the draw; with `fold`, test is that one of `folds` instead of a share."""

    train: float = 0.85
    val: float = 0.05
    test: float = 0.10
    seed: int = 0
    fold: int | None = None
    folds: int = 5


@dataclass
class Phantom:
    """Size of a generated cohort: subjects, voxel size in mm, volume in voxels."""

    subjects: int = 250
    seed: int = 7
    spacing: float = SPACING
    shape: list[int] = field(default_factory=lambda: list(SHAPE))


@dataclass
class Data:
    """A cohort: its table, and how a scan becomes a volume."""

    table: str = MISSING
    shape: list[int] = MISSING
    spacing: float = MISSING
    transform: Any = MISSING
    augmentation: Any = None
    split: Split = field(default_factory=Split)
    cache_dtype: str = "float16"
    on_bad_scan: str = "reject"
    diagnoses: list[str] | None = None
    workers: int | None = None
    phantom: Phantom | None = None


@dataclass
class EstimatorSettings:
    """What the gradient estimator does not share with the U-Net; see ldae.models.gradient_estimator."""

    modes: int = 0
    start_from_unet: bool = False


@dataclass
class Model:
    """One of each network; `conf/model/*.yaml` are bundles."""

    autoencoder: Any = MISSING
    unet: Any = MISSING
    encoder: Any = MISSING
    estimator: EstimatorSettings = field(default_factory=EstimatorSettings)
    discriminator: Any = MISSING


@dataclass
class Diffusion:
    """Schedule of the noise, and what the network predicts."""

    schedule: Any = MISSING
    parameterisation: Any = MISSING


@dataclass
class Config:
    """What `train.py`, `encode_latents.py` and `evaluate.py` share."""

    name: str = "default"
    seed: int = 0
    paths: Paths = field(default_factory=Paths)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    optim: Optim = field(default_factory=Optim)
    loss: Loss = field(default_factory=Loss)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    diffusion: Diffusion = field(default_factory=Diffusion)
    sampler: Any = MISSING
    perceptual: Any = None
    accelerator: Any = MISSING
    stage: Any = MISSING
    probe: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    bench: Any = None


@dataclass
class PreprocessSteps:
    """What is done to a raw scan; None switches a step off. See ldae.preprocessing.steps."""

    bias: Any = None
    brain: Any = None
    registration: Any = None
    template: Any = MISSING
    intensity: Any = None
    limits: Any = MISSING
    regions: Any = None
    columns: Any = MISSING
    spacing: float | None = 1.5
    interpolator: str = "bSpline"


@dataclass
class PreprocessConfig:
    """`ldae preprocess`."""

    preprocess: PreprocessSteps = field(default_factory=PreprocessSteps)


def register() -> None:
    """Make the schemas known to Hydra under the names that `conf/base.yaml` and `conf/preprocess.yaml` start from."""
    ConfigStore.instance().store(name="schema", node=Config)
    ConfigStore.instance().store(name="preprocess_schema", node=PreprocessConfig)


def conf_dir() -> Path:
    """The folder of YAML files: beside the sources in a checkout, inside the package in a wheel."""
    package = Path(__file__).parent
    for candidate in (package / "conf", package.parents[1] / "conf"):
        if (candidate / "base.yaml").exists():
            return candidate
    raise UserError(f"no conf/ folder beside {package}; reinstall ldae")


def compose_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose conf/`name`.yaml with Hydra overrides, as the script of that name does on its command line."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(name, list(overrides))


def check_constructor_arguments(node: Any, key: str = "") -> None:
    """Refuse arguments that a `_target_` does not take, naming the full key, before anything is built."""
    if isinstance(node, ListConfig):
        for index, child in enumerate(node):
            check_constructor_arguments(child, f"{key}[{index}]")
        return
    if not isinstance(node, DictConfig) or node._is_none():
        return
    if "_target_" in node and not OmegaConf.is_missing(node, "_target_"):
        _check_signature(node, key)
    for name in node:
        if not OmegaConf.is_missing(node, name):
            check_constructor_arguments(node[name], f"{key}.{name}" if key else str(name))


def refuse_missing_values(node: Any) -> None:
    """Refuse a node in which a required value (`???`) was not given, before any data is read.

    Raises:
        UserError: names the key and, for a file, what it must be and how to do without it.
    """
    if not isinstance(node, DictConfig) or node._is_none():
        return
    for name in node:
        if OmegaConf.is_missing(node, name):
            key = node._get_full_key(name)
            what = f"a local file with {REQUIRED_FILES[key]}" if key in REQUIRED_FILES else f"{key}=VALUE"
            raise UserError(f"{key} must be given: {what}")
        refuse_missing_values(node[name])


def _check_signature(node: DictConfig, key: str) -> None:
    try:
        target = get_object(node["_target_"])
    except Exception as error:
        now = present_name(node["_target_"])
        hint = f"it is now {now}" if now != node["_target_"] else error
        raise UserError(f"{key}._target_: cannot import {node['_target_']!r} ({hint})") from error
    parameters = inspect.signature(target).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return
    allowed = {p.name for p in parameters} | _INSTANTIATE_KEYS
    for name in node:
        if name not in allowed:
            raise UserError(f"unknown key '{key}.{name}': {node['_target_']} takes {', '.join(sorted(allowed))}")
