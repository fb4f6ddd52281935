"""What the three scripts do with a composed config: build the parts, and call one thing."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ldae.config import check_targets
from ldae.data.cohort import Cohort, load_cohort
from ldae.errors import UserError
from ldae.evaluation.context import Context
from ldae.evaluation.embeddings import cached_embeddings, embed_rows
from ldae.evaluation.probing import External
from ldae.runs import Workspace, workspace

log = logging.getLogger(__name__)


def _check(config: DictConfig) -> None:
    """Everything that can be said about a config without data: unknown arguments, sizes that do not divide."""
    from ldae.models.sizes import check_volume_shape

    check_targets(config)
    check_volume_shape(config.data.shape, config.model.autoencoder, config.model.unet)


def ensure_phantoms(config: DictConfig, accelerator: Accelerator) -> None:
    """Make the phantom cohort of `data=phantom` on first use."""
    if config.data.phantom is None or Path(config.data.table).exists():
        return
    from ldae.data.phantom import make_cohort

    phantom = config.data.phantom
    if accelerator.is_main_process:
        make_cohort(
            Path(config.data.table).parent, phantom.subjects, phantom.seed, phantom.spacing, tuple(phantom.shape),
            workers=config.data.workers,
        )  # fmt: skip
    accelerator.wait_for_everyone()


def open_cohort(config: DictConfig, accelerator: Accelerator, space: Workspace, external: bool = False) -> Cohort:
    """The table with its split, its volumes cached; made by the main process, then read by all.

    An external cohort is all test.
    """
    ensure_phantoms(config, accelerator)
    data = config.data

    def load() -> Cohort:
        return load_cohort(
            table=data.table,
            split_file=None if external else space.split_file,
            transform=instantiate(data.transform),
            cache=Path(config.paths.cache),
            cache_dtype=data.cache_dtype,
            shares={"test": 1.0} if external else {name: data.split[name] for name in ("train", "val", "test")},
            seed=data.split.seed,
            on_bad_scan=data.on_bad_scan,
            diagnoses=data.diagnoses,
            augmentation=instantiate(data.augmentation),
            workers=data.workers,
        )

    with accelerator.main_process_first():
        return load()


def train(config: DictConfig) -> None:
    """Train the stage of `config`, or resume it."""
    from ldae.training.trainer import Trainer

    _check(config)
    accelerator = instantiate(config.accelerator)
    space = workspace(config)
    settings, optim = OmegaConf.to_object(config.trainer), OmegaConf.to_object(config.optim)
    name = config.stage._target_.rsplit(".", 2)[-2]
    run = space.stage(name)
    _check_predecessors(config, space)
    cohort = open_cohort(config, accelerator, space)
    # Partial: Hydra would turn the cohort, a dataclass, into a config.
    stage = instantiate(config.stage, _partial_=True)(cohort=cohort, workspace=space)
    if accelerator.is_main_process:
        run.write_config(config)
        cohort.write_rejected(run.path / "rejected.csv")
    trainer = Trainer(accelerator, run, settings, optim, config.seed)
    trainer.fit(stage, {"split_hash": cohort.split_hash, "transform": cohort.transform.key(), "seed": config.seed})
    accelerator.end_training()


def _check_predecessors(config: DictConfig, space: Workspace) -> None:
    """A missing earlier stage is said before any data is read."""
    for key in ("aekl", "pretrain"):
        if key in config.stage:
            space.predecessor(key, config.stage[key])
    if "latents" in config.stage:
        from ldae.data.latents import check_latents

        check_latents(Path(config.stage.latents or space.latents))


def encode(config: DictConfig) -> None:
    """Compress every scan of the table with the trained autoencoder."""
    from ldae.latent_encoding import encode_cohort

    _check(config)
    accelerator = instantiate(config.accelerator)
    space = workspace(config)
    run = space.predecessor("aekl")
    cohort = open_cohort(config, accelerator, space)
    if run.metadata["split_hash"] != cohort.split_hash:
        raise UserError(f"{run.path} was trained on another split of the subjects than {space.split_file} holds now")
    if run.metadata["transform"] != cohort.transform.key():
        raise UserError(f"{run.path} was trained on volumes of another transform: keep the same data.* values")
    encode_cohort(run, cohort, space.latents, Path(config.data.table), accelerator, config.trainer.batch_size)


def evaluate(config: DictConfig) -> None:
    """Embed every scan, then run each chosen evaluation; see ldae/evaluation/."""
    from ldae.evaluation.report import console_table, merge_metrics, write_report
    from ldae.pipeline import LDAE

    _check(config)
    accelerator = instantiate(config.accelerator)
    space = workspace(config)
    for stage in ("aekl", "pretrain", "repr"):
        space.predecessor(stage)
    evaluators: dict[str, Any] = {name: instantiate(node) for name, node in config.evaluation.items()}
    # Another cohort has no part in the split, and its numbers are its own.
    external = any(isinstance(evaluator, External) for evaluator in evaluators.values())
    cohort = open_cohort(config, accelerator, space, external)
    _check_evaluated(space, cohort, external)
    if not accelerator.is_main_process:
        return
    sampler = instantiate(config.sampler)
    model = LDAE.load(space.root, device=accelerator.device, sampler=sampler)
    context = _context(config, space, cohort, model, external)
    cohort.write_rejected(context.out / "rejected.csv")
    metrics: dict[str, float] = {}
    for name, evaluator in evaluators.items():
        log.info("evaluation: %s", name)
        metrics |= dict(evaluator(context))
        merge_metrics(space.evaluation / "metrics.json", metrics)
    everything = merge_metrics(space.evaluation / "metrics.json", metrics)
    report = write_report(space.evaluation, f"LDAE: {config.name}", everything)
    log.info("%s\n%s and %s", console_table(metrics), space.evaluation / "metrics.json", report)


def _check_evaluated(space: Workspace, cohort: Cohort, external: bool) -> None:
    """The stages must have held out what is evaluated now, and have seen volumes of this transform."""
    for stage in ("aekl", "pretrain", "repr"):
        about = space.predecessor(stage).metadata
        if not external and about["split_hash"] != cohort.split_hash:
            raise UserError(f"{space.root / stage} was trained on another split than {space.split_file} holds now")
        if about["transform"] != cohort.transform.key():
            raise UserError(f"{space.root / stage} was trained on volumes of another transform: keep data.* as it was")


def _context(config: DictConfig, space: Workspace, cohort: Cohort, model: Any, external: bool) -> Context:
    """What the evaluators see of the cohort."""
    run = space.predecessor("repr")
    out = space.evaluation / "external" if external else space.evaluation
    weights = run.sha256("encoder")
    embeddings = cached_embeddings(
        out / "embeddings.csv",
        cohort.table,
        weights,
        lambda: embed_rows(model.embed, cohort.volumes.batch, len(cohort)),
    )

    def untrained() -> np.ndarray:
        torch.manual_seed(run.config.seed)
        encoder = instantiate(run.config.model.encoder).to(model.device).eval()
        return embed_rows(encoder, lambda rows: cohort.volumes.batch(rows).to(model.device), len(cohort))

    def labels(rows: Sequence[int]) -> torch.Tensor:
        paths = cohort.table["labels_path"].iloc[list(rows)]
        return torch.from_numpy(np.stack([cohort.transform.labels(path)[0] for path in paths]))

    perceptual = instantiate(config.perceptual) if config.perceptual else None
    return Context(
        model=model,
        table=cohort.table,
        volumes=cohort.volumes.batch,
        posterior=lambda rows: model.posterior(cohort.volumes.batch(rows)),
        embeddings=embeddings,
        untrained=untrained,
        out=out,
        spacing=(config.data.spacing,) * 3,
        seed=config.seed,
        weights=weights,
        labels=labels if "labels_path" in cohort.table else None,
        perceptual=perceptual,
    )
