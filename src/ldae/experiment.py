"""What train.py, encode_latents.py and evaluate.py do with a composed config: build the parts, and run one of them."""

import hashlib
import logging
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from ldae.config import check_constructor_arguments, is_synthetic, refuse_missing_values
from ldae.data.cohort import Cohort, load_cohort
from ldae.runs import Run, Workspace, open_workspace
from ldae.utils.errors import UserError
from ldae.utils.locks import lock_folder
from ldae.utils.process_pool import available_cores
from ldae.utils.seeding import weights_seed
from ldae.utils.shards import Shard

log = logging.getLogger(__name__)


def train(config: DictConfig) -> None:
    """Train the stage of `config`, or resume it.

    Raises:
        UserError: the config, the data or an earlier stage is faulty, or the run cannot be resumed.
    """
    from ldae.training.changes import check_changes

    _check(config)
    _refuse_shard(config)
    refuse_missing_values(config.stage)
    stage = get_class(config.stage._target_)
    if stage.reads_scans:
        refuse_missing_table(config)
    accelerator = instantiate(config.accelerator)
    space = open_workspace(config)
    run = space.stage(stage.folder(config.stage))
    _check_predecessors(config, space)
    check_changes(run, config)
    with lock_folder(run.path, accelerator.is_main_process):
        if "discriminator" in config.stage and not _has_weights(config.stage.autoencoder):
            _finish_untrained(config, accelerator, space, run)
        else:
            _train(config, accelerator, space, run)
    accelerator.end_training()


def _finish_untrained(config: DictConfig, accelerator: Accelerator, space: Workspace, run: Run) -> None:
    """Stage 1 of an autoencoder that has nothing to train: it is published at once."""
    cohort = open_cohort(config, accelerator, space)
    if accelerator.is_main_process:
        _publish_untrained(config, run, cohort)
        cohort.split.store()
        log.info("%s has nothing to train: stage 1 is done", config.stage.autoencoder._target_)


def _train(config: DictConfig, accelerator: Accelerator, space: Workspace, run: Run) -> None:
    from ldae.data.latents import copy_rejected
    from ldae.training.precision import set_up_backends
    from ldae.training.trainer import Trainer

    set_up_backends(autotune=True)
    kind = get_class(config.stage._target_)
    cohort = open_cohort(config, accelerator, space, views=kind.reads_views) if kind.reads_scans else None
    # A run that is killed before its first checkpoint starts again from the same weights.
    set_seed(weights_seed(config.seed, config.stage._target_))
    # Partial: Hydra would turn the cohort, a dataclass, into a config.
    build = instantiate(config.stage, _partial_=True)
    if cohort is not None:
        stage = build(cohort=cohort, workspace=space)
        data = {"split_hash": cohort.split_hash, "transform": cohort.transform.key()}
        if kind.reads_views and cohort.view_key is not None:
            data["view"] = cohort.view_key
    else:
        stage = build(workspace=space)
        transform = stage.latents.transform or instantiate(config.data.transform).key()
        data = {"split_hash": stage.latents.split_hash, "transform": transform}

    def store() -> None:
        if not accelerator.is_main_process:
            return
        run.write_config(config)
        if cohort is not None:
            cohort.split.store()
            cohort.write_rejected(run.path / "rejected.csv")
        else:
            copy_rejected(_latents_folder(config, space), run.path / "rejected.csv")

    settings, optim = OmegaConf.to_object(config.trainer), OmegaConf.to_object(config.optim)
    Trainer(accelerator, run, settings, optim, config.seed).fit(stage, {**data, "seed": config.seed}, store)


def encode(config: DictConfig) -> None:
    """Compress every scan of the table with the trained autoencoder.

    Raises:
        UserError: the config or the data is faulty, or the autoencoder was trained on other data.
    """
    from ldae.stages.encode_latents import encode_cohort

    _check(config)
    shard = _shard(config)
    refuse_missing_table(config)
    accelerator = instantiate(config.accelerator)
    space = open_workspace(config)
    trained = _has_weights(config.model.autoencoder)
    run = space.predecessor("aekl") if trained else space.stage("aekl")
    cohort = open_cohort(config, accelerator, space)
    if not trained and accelerator.is_main_process:
        _publish_untrained(config, run, cohort)
    accelerator.wait_for_everyone()
    if not cohort.accepts_split(run.metadata["split_hash"]):
        raise UserError(f"{run.path} was trained on another split of the subjects than {space.split_file}")
    if run.metadata["transform"] != cohort.transform.key():
        raise UserError(f"{run.path} was trained on volumes of another transform: keep the same data.* values")
    if accelerator.is_main_process:
        cohort.split.store()
    table, batch_size = Path(config.data.table), config.trainer.batch_size
    with lock_folder(space.latents, accelerator.is_main_process and shard is None):
        encode_cohort(run, cohort, space.latents, table, accelerator, batch_size, shard)


def evaluate(config: DictConfig) -> None:
    """Embed every scan, then run the evaluations that the config chooses; see ldae.evaluation.

    Raises:
        UserError: the config or the data is faulty, or a stage has not been trained or was trained on other data.
    """
    from ldae.evaluation.other_cohort import EXTERNAL
    from ldae.evaluation.run import embed_in_all_processes, run_evaluations
    from ldae.pipeline import LDAE
    from ldae.training.precision import inference_dtype

    _check(config)
    _refuse_shard(config)
    refuse_missing_values(config.perceptual)
    refuse_missing_table(config)
    accelerator = instantiate(config.accelerator)
    space = open_workspace(config)
    for stage in ("aekl", "pretrain", "repr"):
        space.predecessor(stage)
    evaluators = {name: instantiate(node) for name, node in config.evaluation.items()}
    cohort = open_cohort(config, accelerator, space, external=EXTERNAL in evaluators, views=True)
    dtype = inference_dtype(accelerator)
    model = LDAE.load(space.root, device=accelerator.device, sampler=instantiate(config.sampler), dtype=dtype)
    if accelerator.num_processes > 1:
        embed_in_all_processes(model, cohort, evaluators, space, config, accelerator)
    # The other processes end here: they would not wait longer than accelerator.timeout for the main one.
    accelerator.end_training()
    if accelerator.is_main_process:
        run_evaluations(model, cohort, evaluators, space, config)


def open_cohort(
    config: DictConfig, accelerator: Accelerator, space: Workspace, external: bool = False, views: bool = False
) -> Cohort:
    """The cohort of a config. Its split is drawn but not stored yet; all processes transform scans together.

    No process waits in a collective operation while others work for long: each returns once all volumes exist.

    Args:
        external: whether it is another cohort than that of the workspace; all of its subjects are then test subjects.
        views: whether what the semantic encoder sees of each scan is made, too.

    Raises:
        UserError: see `load_cohort`; or the processes do not find the same scans usable.
    """
    make_synthetic_cohort(config, accelerator)
    data = config.data
    cohort = load_cohort(
        table=data.table,
        split_file=None if external else space.split_file,
        transform=instantiate(data.transform),
        cache=Path(config.paths.cache),
        cache_dtype=data.cache_dtype,
        shares={"test": 1.0} if external else {name: data.split[name] for name in ("train", "val", "test")},
        seed=data.split.seed,
        fold=None if external or data.split.fold is None else (data.split.fold, data.split.folds),
        on_bad_scan=data.on_bad_scan,
        diagnoses=data.diagnoses,
        augmentation=instantiate(data.augmentation),
        extend=data.split.extend,
        workers=_workers(data.workers, accelerator),
        progress=accelerator.is_main_process,
        share=_share(config, accelerator),
        view=instantiate(data.view) if views else None,
    )
    _check_agreement(cohort, accelerator)
    return cohort


def refuse_missing_table(config: DictConfig) -> None:
    """Refuse a table that does not exist, before anything is made, unless it is that of a synthetic cohort.

    Raises:
        UserError: there is no such table.
    """
    if not Path(config.data.table).is_file() and not is_synthetic(config):
        raise UserError(f"no such table: {config.data.table}")


def make_synthetic_cohort(config: DictConfig, accelerator: Accelerator) -> None:
    """Make the scans of `data=phantom` if their table does not exist; the main process does so, the others wait."""
    if Path(config.data.table).exists() or not is_synthetic(config):
        return
    from ldae.data.phantom.synthetic_cohort import make_cohort, wait_for_cohort

    phantom = config.data.phantom
    if accelerator.is_main_process:
        make_cohort(
            Path(config.data.table).parent, phantom.subjects, phantom.seed, phantom.spacing, tuple(phantom.shape),
            workers=config.data.workers,
        )  # fmt: skip
    else:
        wait_for_cohort(Path(config.data.table))


def _check(config: DictConfig) -> None:
    """All checks of a config that need no data: unknown arguments, and sizes that are not divisible."""
    from ldae.models.sizes import check_volume_shape

    check_constructor_arguments(config)
    check_volume_shape(config.data.shape, config.model.autoencoder, config.model.unet)


def _check_predecessors(config: DictConfig, space: Workspace) -> None:
    """Refuse a stage whose predecessors are missing before any data is read."""
    for key in ("aekl", "pretrain", "repr"):
        if key in config.stage:
            space.predecessor(key, config.stage[key])
    if "latents" in config.stage:
        from ldae.data.latents import check_latents, refuse_other_table

        check_latents(_latents_folder(config, space))
        if not is_synthetic(config):
            refuse_other_table(_latents_folder(config, space), Path(config.data.table))


def _latents_folder(config: DictConfig, space: Workspace) -> Path:
    return Path(config.stage.latents or space.latents)


def _workers(wanted: int | None, accelerator: Accelerator) -> int:
    """Number of worker processes for each of the processes on this machine, which share its CPU cores."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return max(1, (wanted or available_cores()) // here)


def _shard(config: DictConfig) -> Shard | None:
    return None if config.shard is None else Shard.parse(config.shard)


def _share(config: DictConfig, accelerator: Accelerator) -> tuple[int, int]:
    """Number of this process, and of all processes, of all jobs that share the work."""
    shard = _shard(config) or Shard()
    return (
        shard.index * accelerator.num_processes + accelerator.process_index,
        shard.count * accelerator.num_processes,
    )


def _refuse_shard(config: DictConfig) -> None:
    if config.shard is not None:
        raise UserError("only encode_latents.py takes a shard: leave it out")


def _check_agreement(cohort: Cohort, accelerator: Accelerator) -> None:
    """Refuse a cohort of which the processes find different scans usable: they would train on different rows."""
    if accelerator.num_processes == 1:
        return
    counts = gather_object([(len(cohort), hashlib.sha256("\n".join(cohort.table["path"]).encode()).hexdigest())])
    if len(set(counts)) > 1:
        raise UserError(
            f"the processes find different scans usable ({', '.join(str(count) for count, _ in counts)} of them): "
            "check that every process can read every disk, and run again"
        )


def _has_weights(node: DictConfig) -> bool:
    """Whether a network has parameters to train; `model/autoencoder=identity` has none."""
    from ldae.models.sizes import build_on_meta

    return bool(build_on_meta(node).state_dict())


def _publish_untrained(config: DictConfig, run: Run, cohort: Cohort) -> None:
    """Publish an autoencoder that has no weights, so that later stages find the run of stage 1."""
    target = config.model.autoencoder._target_
    if run.published and run.config.model.autoencoder._target_ != target:
        raise UserError(f"{run.path} is the run of a trained autoencoder, not of {target}: choose another name=...")
    metadata = {"stage": "aekl", "step": 0, "metrics": {}}
    run.publish({"autoencoder": {}}, {**metadata, "split_hash": cohort.split_hash, "transform": cohort.transform.key()})
    run.write_config(config)
