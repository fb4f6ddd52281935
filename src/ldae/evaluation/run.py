"""Runs the chosen evaluations of a trained model on a cohort: Context in, metrics.json, figures and report out."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from ldae.data.cohort import Cohort
from ldae.data.labels import RegionCache
from ldae.data.latents import METADATA_FILE, LatentSet
from ldae.evaluation.context import Context, Evaluator
from ldae.evaluation.edits.anatomy import STRUCTURES
from ldae.evaluation.embeddings import (
    embed_parts,
    embed_rows,
    embeddings_key,
    load_or_compute_embeddings,
    parts_folder,
    read_embeddings,
)
from ldae.evaluation.html_report import write_report
from ldae.evaluation.report import format_console_table, merge_metrics
from ldae.runs import Run, Workspace
from ldae.utils.errors import UserError

log = logging.getLogger(__name__)

EXTERNAL = "external"


def run_evaluations(
    model: Any, cohort: Cohort, evaluators: Mapping[str, Evaluator], space: Workspace, config: DictConfig
) -> dict[str, float]:
    """Run `evaluators` in their order and write metrics.json, figures and report.html below `space.evaluation`.

    Numbers are merged into metrics.json after every evaluation: what is done is kept if a later one fails.

    Raises:
        UserError: `external` beside others (its cohort has no test split of this model), or another split or transform.
    """
    external = EXTERNAL in evaluators
    if external and len(evaluators) > 1:
        raise UserError("evaluation=external judges another cohort and runs alone: give evaluation=[external]")
    _check_cohort(space.predecessor("repr"), cohort, external)
    out = space.evaluation
    out.mkdir(parents=True, exist_ok=True)
    context = build_context(model, cohort, space, config, _prefix(evaluators))
    metrics: dict[str, float] = {}
    for name, evaluator in evaluators.items():
        log.info("evaluation: %s", name)
        found = dict(evaluator(context))
        metrics |= found
        merged = merge_metrics(out / "metrics.json", found)
        report = write_report(out, f"{config.name}: evaluation", merged)
    if metrics:
        log.info(
            "\n%s\n%s",
            format_console_table(select_headline(metrics)),
            f"all {len(metrics)} numbers and figures: {report}",
        )
    return metrics


def _prefix(evaluators: Mapping[str, Evaluator]) -> str:
    """Of the names of files about another cohort."""
    return "external_" if EXTERNAL in evaluators else ""


def select_headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The few that belong on a console: first metrics of probes and baselines, differences, and the rest in brief."""
    shown = (
        "/auc", "/mae", "/auc_difference", "/mae_difference", "/auc_age_adjusted",
        "/ssim", "/ssim_mask", "_r", "error_ratio", "code/std", "_spearman_share", "/ventricle_error",
    )  # fmt: skip
    stems = [name for name in metrics if name.endswith(shown) or name.startswith("generation/")]
    wanted = {stem + suffix for stem in stems for suffix in ("", "_low", "_high")}
    return {name: value for name, value in metrics.items() if name in wanted}


def _check_cohort(run: Run, cohort: Cohort, external: bool) -> None:
    if run.metadata["transform"] != cohort.transform.key():
        raise UserError(f"{run.path} was trained on volumes of another transform: keep the same data.* values")
    if not external and run.metadata["split_hash"] != cohort.split_hash:
        raise UserError(f"{run.path} was trained on another split; for another cohort give evaluation=[external]")


def embed_in_all_processes(
    model: Any,
    cohort: Cohort,
    evaluators: Mapping[str, Evaluator],
    space: Workspace,
    config: DictConfig,
    accelerator: Accelerator,
) -> None:
    """Embed `cohort` in all processes of `accelerator`, so that `run_evaluations` finds it done. All call this.

    Raises:
        UserError: as `run_evaluations`, on all processes.
    """
    _check_cohort(space.predecessor("repr"), cohort, EXTERNAL in evaluators)
    path = _embeddings_path(space, _prefix(evaluators))
    key, size = embeddings_key(cohort.table, _embedder(model, space)), int(config.trainer.batch_size)
    if read_embeddings(path, key) is None:
        parts = parts_folder(path, key, size)
        embed_parts(_embed(model), cohort.volumes.batch, len(cohort), size, parts, accelerator)


def _embeddings_path(space: Workspace, prefix: str) -> Path:
    return space.evaluation / f"{prefix}embeddings.csv"


def _embedder(model: Any, space: Workspace) -> str:
    """What y comes from: the encoder's weights, and the precision where it is a reduced one."""
    weights = space.predecessor("repr").sha256("encoder")
    return weights if model.dtype == torch.float32 else f"{weights}, {model.dtype}"


def _embed(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: model.embed(x.to(model.device))


def _embeddings(model: Any, cohort: Cohort, space: Workspace, config: DictConfig, prefix: str) -> np.ndarray:
    """y of every scan, `<prefix>embeddings.csv`."""
    return _embedded(_embeddings_path(space, prefix), _embedder(model, space), _embed(model), cohort, config)


def _embedded(
    path: Path, weights: str, embed: Callable[[Tensor], Tensor], cohort: Cohort, config: DictConfig
) -> np.ndarray:
    """The embeddings at `path`, computed if they are not there."""
    size, count = int(config.trainer.batch_size), len(cohort)
    parts = parts_folder(path, embeddings_key(cohort.table, weights), size)
    return load_or_compute_embeddings(
        path, cohort.table, weights, lambda: embed_rows(embed, cohort.volumes.batch, count, size, parts=parts)
    )


def build_context(model: Any, cohort: Cohort, space: Workspace, config: DictConfig, prefix: str = "") -> Context:
    """The Context of `cohort`; its embeddings are computed or reused, `<prefix>embeddings.csv`."""
    repr_run, aekl_run = space.predecessor("repr"), space.predecessor("aekl")
    encoder, out = repr_run.sha256("encoder"), space.evaluation

    def untrained() -> np.ndarray:
        node, seed = repr_run.config.model.encoder, int(repr_run.config.seed)
        path, weights = out / f"{prefix}embeddings_untrained.csv", f"seed {seed}, {encoder}"
        return _embedded(path, weights, _fresh_encoder(node, seed, model.encoder), cohort, config)

    return Context(
        model=model,
        table=cohort.table,
        volumes=cohort.volumes.batch,
        posterior=_posterior(model, cohort, space, aekl_run.sha256("autoencoder")),
        embeddings=_embeddings(model, cohort, space, config, prefix),
        untrained=untrained,
        out=out,
        spacing=_spacing(cohort),
        seed=int(config.seed),
        weights=hashlib.sha256(f"{encoder}{aekl_run.sha256('autoencoder')}".encode()).hexdigest(),
        regions=_regions(cohort, Path(config.paths.cache)),
        perceptual=_perceptual(config, model.device),
    )


def _fresh_encoder(node: DictConfig, seed: int, trained: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """The encoder as it was before training: the same config and reference, random weights of this seed, eval mode."""
    device = next(trained.parameters()).device
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = instantiate(node).eval().to(device)
    if trained.reference is not None:
        encoder.set_reference(trained.reference, trained.spread)
    return lambda x: encoder(x.to(device))


def _posterior(
    model: Any, cohort: Cohort, space: Workspace, autoencoder: str
) -> Callable[[Sequence[int]], tuple[Tensor, Tensor]]:
    """Stored latents where every scan has one of this autoencoder, otherwise computed anew."""

    def computed(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mean, std = model.posterior(cohort.volumes.batch(rows).to(model.device))
        return mean.float().cpu(), std.float().cpu()

    if not (space.latents / METADATA_FILE).exists():
        return computed
    latents = LatentSet.open(space.latents)
    places = {path: row for row, path in enumerate(latents.table["path"])}
    if latents.autoencoder != autoencoder or not set(cohort.table["path"]) <= places.keys():
        return computed
    order = np.array([places[path] for path in cohort.table["path"]])
    return lambda rows: (latents.mean[order[rows]], latents.std[order[rows]])


def _spacing(cohort: Cohort) -> tuple[float, float, float]:
    if cohort.transform.spacing is not None:
        return cohort.transform.spacing
    import nibabel

    sizes = nibabel.load(cohort.table["path"].iloc[0]).header.get_zooms()[:3]
    return float(sizes[0]), float(sizes[1]), float(sizes[2])


def _regions(cohort: Cohort, cache: Path) -> Callable[[Sequence[int], Sequence[int]], np.ndarray] | None:
    """Label maps through the cohort's transform, if every scan has one; each is read once and kept in `cache`."""
    if "labels_path" not in cohort.table:
        return None
    paths = cohort.table["labels_path"]
    if not all(isinstance(path, str) and Path(path).is_file() for path in paths):
        missing = int(sum(pd.isna(paths) | (paths == "")))
        log.warning("label maps are left out: labels_path names no file for some scans (%d are empty)", missing)
        return None
    stored = RegionCache(cache, cohort.transform, STRUCTURES.values())
    return lambda rows, labels: stored.fractions([paths.iloc[row] for row in rows], labels)


def _perceptual(config: DictConfig, device: torch.device) -> Callable[[Tensor, Tensor], Tensor] | None:
    """LPIPS over all slices of the three planes, or None where it is not configured."""
    node = config.get("perceptual")
    if not node or not node["_target_"].endswith("SliceLpips"):
        return None
    # The report's own definition, whatever the training loss: mean over all slices of all planes, in [-1, 1].
    return instantiate(node, share=1.0, total=1.0, signed=True).to(device)
