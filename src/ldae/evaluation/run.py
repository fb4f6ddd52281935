"""Runs the chosen evaluations of a trained model on a cohort and leaves metrics.json, figures and report.html."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from ldae.config import is_synthetic
from ldae.data.cohort import Cohort
from ldae.data.labels import RegionCache
from ldae.data.latents import METADATA_FILE, LatentSet
from ldae.data.table import SPLITS
from ldae.evaluation.context import Context, Evaluator
from ldae.evaluation.edits.anatomy import REGIONS
from ldae.evaluation.embeddings import embed_cohort, embed_cohort_in_all_processes, hash_cohort
from ldae.evaluation.first_screen.facts import TrainingFacts
from ldae.evaluation.html_report import write_report
from ldae.evaluation.initial_encoder import build_initial_encoder, count_draws
from ldae.evaluation.longitudinal import load_longitudinal_cohort, replace_test_split
from ldae.evaluation.other_cohort import EXTERNAL, file_prefix, find_prefix
from ldae.evaluation.probes.evaluator import ExternalCohort, find_scored_probes
from ldae.evaluation.results import ResultsFolder, start_record
from ldae.evaluation.supervised import SupervisedTwins
from ldae.runs import Workspace
from ldae.scans.scan import open_scan
from ldae.utils.errors import UserError
from ldae.utils.metric_table import format_console_table, select_headline
from ldae.utils.results_record import Source

if TYPE_CHECKING:
    from ldae.pipeline import LDAE

log = logging.getLogger(__name__)


def run_evaluations(
    model: "LDAE", cohort: Cohort, evaluators: Mapping[str, Evaluator], space: Workspace, config: DictConfig
) -> dict[str, float]:
    """Run `evaluators` on `cohort`; results go to `space.evaluation`. Returns the metrics of this call.

    Raises:
        UserError: `external` is combined with other evaluations (they need this model's test split, which another
            cohort does not have) or has no frozen probes of this model, or the model was trained on another split or
            transform, or a supervised network on another split, transform or view.
    """
    _check(model, cohort, evaluators, space)
    prefix = find_prefix(evaluators, space, config)
    twins = SupervisedTwins(space, cohort, prefix, model.device, int(config.trainer.batch_size))
    twins.refuse_unfit(find_scored_probes(evaluators, model.bundle.weights_hash))
    cohort.write_rejected(space.evaluation / f"{file_prefix(prefix)}rejected.csv")
    start_record(space.evaluation, space.predecessor("repr").sha256("encoder"))
    context = replace(build_context(model, cohort, space, config, prefix), supervised=twins)
    metrics = run_in_context(context, evaluators, f"{config.name}: evaluation", TrainingFacts.of(space))
    if headline := select_headline(metrics):
        log.info("%d metrics, among them\n%s", len(metrics), format_console_table(headline))
    return metrics


def run_in_context(
    context: Context, evaluators: Mapping[str, Evaluator], title: str, facts: TrainingFacts | None = None
) -> dict[str, float]:
    """Run `evaluators` in their order; returns their metrics.

    metrics.json is saved after every evaluator. The report is written once, at the end or when an evaluator fails, and
    shows everything that metrics.json and the folder contain by then and that belongs to the present weights and scans.
    """
    results, metrics = ResultsFolder(context), {}
    try:
        for name, evaluator in evaluators.items():
            log.info("evaluation: %s", name)
            metrics |= results.run(name, evaluator)
    finally:
        if results.record:
            log.info("report: %s", write_report(context.out, title, results.metrics(), results.record, facts))
    return metrics


def _check(model: "LDAE", cohort: Cohort, evaluators: Mapping[str, Evaluator], space: Workspace) -> None:
    """Refuse what cannot be evaluated, before anything is computed or written."""
    run, external = space.predecessor("repr"), evaluators.get(EXTERNAL)
    if external is not None and len(evaluators) > 1:
        raise UserError("evaluation=external evaluates another cohort and must run alone: give evaluation=[external]")
    if run.metadata["transform"] != cohort.transform.key():
        raise UserError(f"{run.path} was trained on volumes of another transform: keep the same data.* values")
    if run.metadata.get("view") != cohort.view_key:
        raise UserError(f"{run.path} was trained with another view of the scans: keep the same data.view.* values")
    if external is None and not cohort.accepts_split(run.metadata["split_hash"]):
        raise UserError(f"{run.path} was trained on another split; for another cohort give evaluation=[external]")
    if isinstance(external, ExternalCohort):
        external.read_probes(model.bundle.weights_hash)


def embed_in_all_processes(
    model: "LDAE",
    cohort: Cohort,
    evaluators: Mapping[str, Evaluator],
    space: Workspace,
    config: DictConfig,
    accelerator: Accelerator,
) -> None:
    """Embed `cohort` in all processes of `accelerator`, so that `run_evaluations` only collects the embeddings.

    All processes call this.

    Raises:
        UserError: as `run_evaluations`, on all processes.
    """
    _check(model, cohort, evaluators, space)
    path = _embeddings_file(space, find_prefix(evaluators, space, config))
    size = int(config.trainer.batch_size)
    embed_cohort_in_all_processes(path, _encoder_id(model, space), _encoder_of(model), cohort, size, accelerator)


def _embeddings_file(space: Workspace, prefix: str, kind: str = "embeddings") -> Path:
    return space.evaluation / f"{file_prefix(prefix)}{kind}.csv"


def _encoder_id(model: "LDAE", space: Workspace) -> str:
    """What y is computed with: the hash of the encoder's weights, and its precision unless that is float32."""
    weights = space.predecessor("repr").sha256("encoder")
    return weights if model.dtype == torch.float32 else f"{weights}, {model.dtype}"


def _encoder_of(model: "LDAE") -> Callable[[Tensor], Tensor]:
    return lambda view: model.embed_views(view.to(model.device))


def build_context(model: "LDAE", cohort: Cohort, space: Workspace, config: DictConfig, prefix: str = "") -> Context:
    """The Context of `cohort`. Its embeddings are reused or computed.

    Args:
        prefix: see `find_prefix`.
    """
    repr_run, aekl_run = space.predecessor("repr"), space.predecessor("aekl")
    encoder, autoencoder = repr_run.sha256("encoder"), aekl_run.sha256("autoencoder")
    path, size = _embeddings_file(space, prefix), int(config.trainer.batch_size)

    def untrained(draw: int) -> np.ndarray:
        file = _embeddings_file(space, prefix, f"embeddings_untrained_{draw}")
        # The mean volume of the trained encoder is a part of its weights.
        weights = f"initial weights, draw {draw}, of {encoder}"
        encoder_fn = build_initial_encoder(repr_run, draw, model.encoder)
        return embed_cohort(file, weights, lambda view: encoder_fn(view.to(model.device)), cohort, size)

    own = Context(
        model=model,
        table=cohort.table,
        volumes=cohort.volumes.batch,
        seen=None if cohort.view_key is None else cohort.views.batch,
        posterior=_posterior(model, cohort, space, autoencoder),
        embeddings=embed_cohort(path, _encoder_id(model, space), _encoder_of(model), cohort, size),
        untrained=untrained,
        untrained_draws=count_draws(repr_run),
        out=space.evaluation,
        spacing=_spacing(cohort),
        seed=int(config.seed),
        weights=model.bundle.weights_hash,
        regions=_regions(cohort, Path(config.paths.cache)),
        perceptual=_perceptual(config, model.device),
        source=_find_source(cohort, space, config),
        prefix=prefix,
        open_scan=lambda row: open_scan(cohort.table["path"].iloc[row], cohort.transform),
    )
    if prefix or not is_synthetic(config):
        return own

    def longitudinal() -> Context:
        later = load_longitudinal_cohort(config, cohort)
        file = _embeddings_file(space, prefix, "embeddings_longitudinal")
        y = embed_cohort(file, _encoder_id(model, space), _encoder_of(model), later, size)
        return replace_test_split(own, later, y, _regions(later, Path(config.paths.cache)))

    return replace(own, longitudinal=longitudinal)


def _find_source(cohort: Cohort, space: Workspace, config: DictConfig) -> Source:
    """What results of `cohort` are computed from."""
    runs = (space.predecessor(stage) for stage in ("aekl", "pretrain", "repr"))
    weights = {name: entry["sha256"] for run in runs for name, entry in run.metadata["weights"].items()}
    counts = cohort.table["split"].value_counts()
    return Source(
        weights=weights,
        table=str(config.data.table),
        rows=hash_cohort(cohort),
        split_hash=cohort.split_hash,
        scans={split: int(counts[split]) for split in SPLITS if split in counts},
    )


def _posterior(
    model: "LDAE", cohort: Cohort, space: Workspace, autoencoder: str
) -> Callable[[Sequence[int]], tuple[Tensor, Tensor]]:
    """Reads stored latents if this autoencoder has encoded every scan as it is now; otherwise encodes them anew."""

    def encode(rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mean, std = model.posterior(cohort.volumes.batch(rows).to(model.device))
        return mean.float().cpu(), std.float().cpu()

    if not (space.latents / METADATA_FILE).exists():
        return encode
    latents = LatentSet.open(space.latents)
    rows = latents.find_rows(cohort.table)
    if latents.autoencoder != autoencoder or (rows < 0).any() or len(latents.find_outdated(cohort)):
        return encode
    return lambda chosen: (latents.mean[rows[chosen]], latents.std[rows[chosen]])


def _spacing(cohort: Cohort) -> tuple[float, float, float]:
    """Voxel size in mm: the transform's, or that of the first scan if the transform keeps each scan's own."""
    if cohort.transform.spacing is not None:
        return cohort.transform.spacing
    import nibabel

    sizes = nibabel.load(cohort.table["path"].iloc[0]).header.get_zooms()[:3]
    return float(sizes[0]), float(sizes[1]), float(sizes[2])


def _regions(cohort: Cohort, cache: Path) -> Callable[[Sequence[int], Sequence[int]], np.ndarray] | None:
    """Reads label maps in model space, each once and then from `cache`; None unless every scan has one."""
    if "labels_path" not in cohort.table:
        return None
    paths = cohort.table["labels_path"]
    if not all(isinstance(path, str) and Path(path).is_file() for path in paths):
        missing = int(sum(pd.isna(paths) | (paths == "")))
        log.warning("label maps are not used: labels_path names no file for some scans (%d are empty)", missing)
        return None
    stored = RegionCache(cache, cohort.transform, REGIONS.values())
    return lambda rows, labels: stored.fractions([paths.iloc[row] for row in rows], labels)


def _perceptual(config: DictConfig, device: torch.device) -> Callable[[Tensor, Tensor], Tensor] | None:
    """LPIPS over all slices of the three planes, or None if it is not configured."""
    node = config.get("perceptual")
    if not node or not node["_target_"].endswith("SliceLpips"):
        return None
    # The report's own definition, whatever the training loss: mean over all slices of all planes, in [-1, 1].
    return instantiate(node, share=1.0, total=1.0, signed=True).to(device)
