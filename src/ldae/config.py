"""Schemas of the fixed config groups, and the checks of a config that need no data.

Hydra merges every YAML file and override into these dataclasses, so a mistyped key fails at compose with its full name.
Groups that choose a class (`_target_`) are checked against that class's constructor by `check_constructor_arguments`.
"""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.utils import get_object
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from ldae.data.phantom import SHAPE, SPACING
from ldae.utils.errors import UserError
from ldae.utils.renamed import ARGUMENTS, present_name

# Content of each required file, and how to train deliberately without it.
REQUIRED_FILES = {
    "perceptual.backbone": "torchvision's SqueezeNet 1.1 weights (perceptual=none: no perceptual term)",
    "perceptual.heads": "the linear heads of LPIPS 0.1 for SqueezeNet (perceptual=none: no perceptual term)",
    "perceptual.weights": "a MedicalNet checkpoint (perceptual=none: no perceptual term)",
    "stage.initial_weights": "weights of an AutoencoderKL to start from (stage.initial_weights=null: random weights)",
    "model.encoder.backbone.weights": (
        "torchvision's ImageNet weights of ConvNeXt-Small (model.encoder.backbone.weights=null: random weights)"
    ),
}
NUMBERS = {bool: "true or false", int: "a whole number", float: "a number"}
_INSTANTIATE_KEYS = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}

# Field metadata: what another value of the key does to a training that is resumed. A key without it must not change.
RESUME = "resume"
HARMLESS = {RESUME: "harmless"}
HARMLESS_AT_CONSTANT_RATE = {RESUME: "harmless while the learning rate does not decay"}


@dataclass
class Paths:
    """Folders, relative to the working directory."""

    runs: str = "runs"
    data: str = "data"
    cache: str = "data/cache"  # of preprocessed volumes and regions


@dataclass
class TrainerSettings:
    """The training loop. A step is an optimiser step; `max_epochs` is converted to steps."""

    max_steps: int | None = field(default=None, metadata=HARMLESS_AT_CONSTANT_RATE)
    max_epochs: float | None = field(default=None, metadata=HARMLESS_AT_CONSTANT_RATE)
    batch_size: int = field(default=4, metadata=HARMLESS)  # samples per process and micro-batch
    accumulate: int = field(default=1, metadata=HARMLESS)  # micro-batches per step
    clip: float | None = 1.0  # largest norm of the gradient; None: not clipped
    ema: float | None = 0.999  # decay of the weights' moving average; None: no average
    ema_warmup: bool = True  # a smaller decay in the first steps, so that the average forgets the initial weights
    log_every: int = field(default=50, metadata=HARMLESS)  # all of these in steps
    validate_every: int | None = field(default=500, metadata=HARMLESS)
    validate_every_epochs: float | None = field(default=None, metadata=HARMLESS)  # in place of validate_every
    preview_every: int | None = field(default=None, metadata=HARMLESS)
    checkpoint_every: int = field(default=500, metadata=HARMLESS)
    keep_states: int = field(default=2, metadata=HARMLESS)  # number of checkpoints
    patience: int | None = field(default=None, metadata=HARMLESS)  # validations without improvement before the end
    validation_scans: int | None = None  # None: all
    # Memory format of convolutions; None: the one that was measured to be faster (docs/bench.md).
    channels_last: bool | None = field(default=None, metadata=HARMLESS)
    # Recompute activations in the backward pass instead of keeping them: less memory, more time.
    checkpointing: bool = field(default=False, metadata=HARMLESS)
    compile: bool = field(default=False, metadata=HARMLESS)
    # Record the passes of stages 2 and 3 as a CUDA graph, on one GPU and without checkpointing (step_graph.py).
    cuda_graph: bool = field(default=True, metadata=HARMLESS)
    workers: int | None = field(default=None, metadata=HARMLESS)  # threads that read batches ahead; None: one
    # Consecutive steps with a non-finite loss or gradient before training is given up.
    max_skipped: int = field(default=10, metadata=HARMLESS)
    # Resume although the data, the predecessors or the config have changed.
    accept_changes: bool = field(default=False, metadata=HARMLESS)


@dataclass
class Optim:
    """Adam, and the schedule of its learning rate."""

    lr: float = 1e-4
    discriminator_lr: float = 1e-4
    encoder_lr: float | None = None  # of the semantic encoder; None: lr
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 0.0
    warmup_steps: int = 0
    final_factor: float = 1.0  # learning rate at the last step over `lr`, reached along half a cosine; 1: constant


@dataclass
class Loss:
    """Weights of the terms of stage 1's loss besides L1, and how stage 3 draws its samples."""

    kl_weight: float = 1e-7
    ssim_weight: float = 0.0  # of 1 - SSIM; 0 as published
    perceptual_weight: float = 1e-3
    adversarial_weight: float = 0.025
    adversarial_start: int = 0  # step at which the discriminator is switched on
    time_power: float = 1.0  # see ldae.stages.repr.ReprStage
    other_visit: float = 0.0  # see ldae.stages.repr.ReprStage


@dataclass
class Split:
    """Fractions of subjects, and the seed of the draw. With `fold`, that one of `folds` is the test split."""

    train: float = 0.85
    val: float = 0.05
    test: float = 0.10
    seed: int = 0
    fold: int | None = None
    folds: int = 5
    extend: bool = False  # draw subjects who are new in the table into the stored split


@dataclass
class Longitudinal:
    """The synthetic cohort of later visits that evaluations of change over time use; it is made when they need it.

    Its seed differs from that of the training cohort, so that none of its subjects was trained on.
    """

    subjects: int = 40
    seed: int = 1007
    months: list[int] = field(default_factory=lambda: [0, 12, 36, 72])  # of every subject's visits


@dataclass
class Phantom:
    """Size of the synthetic cohort."""

    subjects: int = 250
    seed: int = 7
    spacing: float = SPACING  # mm
    shape: list[int] = field(default_factory=lambda: list(SHAPE))  # voxels
    longitudinal: Longitudinal = field(default_factory=Longitudinal)


@dataclass
class Data:
    """A cohort: its table, and how a scan becomes a volume.

    A change of the table, of the split or of what is rejected is found when a run is resumed: a checkpoint knows its
    training scans.
    """

    table: str = field(default=MISSING, metadata=HARMLESS)
    shape: list[int] = MISSING  # voxels
    spacing: float = MISSING  # mm
    transform: Any = MISSING
    # What the semantic encoder sees of a scan. It matters to a resumed run of the stages that read it, see
    # ldae.training.changes.
    view: Any = None
    augmentation: Any = None
    split: Split = field(default_factory=Split, metadata=HARMLESS)
    cache_dtype: str = "float16"  # or uint8: half the disk space, in steps of 1/255
    on_bad_scan: str = field(default="reject", metadata=HARMLESS)  # or stop
    diagnoses: list[str] | None = field(default=None, metadata=HARMLESS)  # scans that are used; None: all
    # Processes that transform scans; None: one per CPU core.
    workers: int | None = field(default=None, metadata=HARMLESS)
    # Size of the synthetic cohort; None: the table is the user's own.
    phantom: Phantom | None = field(default=None, metadata=HARMLESS)


@dataclass
class EstimatorSettings:
    """What the gradient estimator does not share with the U-Net; see ldae.models.gradient_estimator."""

    modes: int = 0
    start_from_unet: bool = False


@dataclass
class PriorSettings:
    """The semantic prior, apart from what the encoder and the table give; see ldae.prior.semantic_prior."""

    components: int = 64
    hidden: int = 0
    width: int = 256
    dropout: float = 0.1
    guidance: float = 1.0
    steps: int = 20


@dataclass
class Model:
    """One of each network; a file of conf/model chooses them together."""

    autoencoder: Any = MISSING
    unet: Any = MISSING
    encoder: Any = MISSING
    estimator: EstimatorSettings = field(default_factory=EstimatorSettings)
    discriminator: Any = MISSING
    prior: PriorSettings = field(default_factory=PriorSettings)


@dataclass
class Diffusion:
    """Noise schedule, and what the network predicts."""

    schedule: Any = MISSING
    parameterisation: Any = MISSING


@dataclass
class Config:
    """What `train.py`, `encode_latents.py` and `evaluate.py` share.

    The groups that are harmless on resume reach a training through `stage` alone, where they are compared by value.
    Which keys of `stage` and `accelerator` are harmless is said by the stage's class (`harmless_on_resume`) and by
    ldae.training.precision (`HARMLESS_ON_RESUME`).
    """

    name: str = field(default="default", metadata=HARMLESS)
    shard: str | None = field(default=None, metadata=HARMLESS)  # encode_latents.py: part I/N of the scans
    seed: int = 0
    paths: Paths = field(default_factory=Paths, metadata=HARMLESS)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    optim: Optim = field(default_factory=Optim)
    loss: Loss = field(default_factory=Loss, metadata=HARMLESS)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model, metadata=HARMLESS)
    diffusion: Diffusion = field(default_factory=Diffusion, metadata=HARMLESS)
    sampler: Any = field(default=MISSING, metadata=HARMLESS)
    perceptual: Any = field(default=None, metadata=HARMLESS)
    accelerator: Any = MISSING
    stage: Any = MISSING
    task: Any = field(default=None, metadata=HARMLESS)  # the label of stage=supervised
    probe: dict[str, Any] = field(default_factory=dict, metadata=HARMLESS)
    probe_scaling: Any = field(default=None, metadata=HARMLESS)
    alpha: Any = field(default=MISSING, metadata=HARMLESS)  # what alpha = 1 means in edits
    evaluation: dict[str, Any] = field(default_factory=dict, metadata=HARMLESS)
    bench: Any = field(default=None, metadata=HARMLESS)


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
    spacing: float | None = 1.5  # mm; None: that of the template or of the scan
    interpolator: str = "bSpline"
    assume_orientation: str | None = None  # RAS or LAS: axes of scans whose files state none


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
    """Refuse arguments that a `_target_` does not take, before anything is built.

    Raises:
        UserError: names the full key of the argument, or of a `_target_` that cannot be imported.
    """
    if isinstance(node, ListConfig):
        for index, child in enumerate(node):
            check_constructor_arguments(child, f"{key}[{index}]")
        return
    if not isinstance(node, DictConfig) or node._is_none():
        return
    if is_dataclass(schema := OmegaConf.get_type(node)):
        _refuse_other_settings(node, key, {setting.name for setting in fields(schema)} | _settings_of_unet(node))
    if "_target_" in node and not OmegaConf.is_missing(node, "_target_"):
        _check_signature(node, key)
    for name in node:
        if not OmegaConf.is_missing(node, name):
            check_constructor_arguments(node[name], f"{key}.{name}" if key else str(name))


def is_synthetic(config: DictConfig) -> bool:
    """Whether the table is the one that `data=phantom` derives from its parameters, and not a file of the user's."""
    from ldae.data.phantom.synthetic_cohort import cohort_folder

    phantom = config.data.phantom
    if phantom is None:
        return False
    folder = cohort_folder(config.paths.data, phantom.subjects, phantom.seed, phantom.spacing, phantom.shape)
    return Path(config.data.table) == folder / "scans.csv"


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


def _settings_of_unet(node: DictConfig) -> set[str]:
    """For the group of the gradient estimator the arguments of the U-Net, which it takes over; see estimator_node."""
    unet = OmegaConf.select(node._get_root(), "model.unet._target_", default=None)
    if unet is None or OmegaConf.get_type(node) is not EstimatorSettings:
        return set()
    return set(inspect.signature(get_object(unet)).parameters)


def _refuse_other_settings(node: DictConfig, key: str, known: set[str]) -> None:
    """Refuse settings that +KEY=VALUE added to a group of fixed settings: nothing would read them."""
    for name in node:
        if name not in known:
            there = ", ".join(sorted(known))
            raise UserError(f"there is no setting '{f'{key}.' if key else ''}{name}'; there are {there}")


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
            if name in ARGUMENTS.get(node["_target_"], {}):
                raise UserError(f"'{key}.{name}' is now '{key}.{ARGUMENTS[node['_target_']][name]}'")
            raise UserError(f"unknown key '{key}.{name}': {node['_target_']} takes {', '.join(sorted(allowed))}")
    _refuse_text_for_numbers(node, key, parameters)


def _refuse_text_for_numbers(node: DictConfig, key: str, parameters: Iterable[inspect.Parameter]) -> None:
    """Refuse text where a class takes a number, as 4x where 4 was meant: it would fail late, or count as true."""
    for parameter in parameters:
        name, annotation = parameter.name, parameter.annotation
        kinds = set(get_args(annotation) if isinstance(annotation, UnionType) else [annotation]) - {NoneType}
        if not kinds or not kinds <= set(NUMBERS) or name not in node:
            continue
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        if isinstance(node[name], str):
            what = " or ".join(text for kind, text in NUMBERS.items() if kind in kinds)
            raise UserError(f"{key}.{name}={node[name]}: {what} is needed")
