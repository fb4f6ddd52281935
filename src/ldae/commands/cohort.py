"""`ldae cohort`: a folder of raw scans in, a trained and evaluated model out."""

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ldae.commands.cohort_targets import Target, choose_targets
from ldae.commands.options import PATH
from ldae.utils.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ldae.runs import Workspace

log = logging.getLogger(__name__)

LABELS = Path("derivatives/dlmuse")  # below the source, label maps that are used if they exist
FROM_PHANTOMS = ("aekl", "pretrain")  # stages that start from the weights that phantoms have given
SHARED = ("paths.", "accelerator", "data.workers")  # overrides that hold for the phantoms' training, too
EVALUATED = "cohort.json"  # in the run's folder: what the finished evaluation was computed from


@click.command()
@click.argument("source", type=PATH)
@click.argument("overrides", nargs=-1)
@click.option("--name", required=True, help="Name of the run; the results are in runs/NAME/evaluation.")
@click.option("--experiment", default="cohort", show_default=True, help="Experiment of conf/experiment.")
@click.option("--derivatives", type=PATH, help="Folder of the preprocessed scans; default: derivatives/NAME.")
@click.option("--labels", type=PATH, help="Folder of label maps *_dseg.nii.gz; default: SOURCE/derivatives/dlmuse.")
@click.option(
    "--start",
    default="demo",
    show_default=True,
    help="Experiment on phantoms whose weights stages 1 and 2 start from. It is trained first if runs/START has none "
    "yet; none: random weights.",
)
@click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set any value of conf/preprocess for preprocessing."
)
@click.option("-j", "--workers", default=None, type=click.IntRange(1), help="Processes; default: one for each core.")
def cohort(
    source: Path,
    overrides: tuple[str, ...],
    name: str,
    experiment: str,
    derivatives: Path | None,
    labels: Path | None,
    start: str,
    settings: tuple[str, ...],
    workers: int | None,
) -> None:
    """Preprocess raw scans, train the three stages on them and evaluate them with cross-validation.

    SOURCE is a BIDS dataset, or what else `ldae preprocess` takes. OVERRIDES are those of train.py. The same command
    continues where an earlier one stopped. What is predicted, age, sex and diagnosis, depends on what the tables have.
    """
    from ldae.commands.preprocess_folder import preprocess_folder
    from ldae.utils.entrypoint import one_line_errors
    from ldae.utils.overrides import quote_overrides

    with one_line_errors():
        check_names(name, start, labels)
        derivatives = derivatives or Path("derivatives") / name
        if labels is None and (source / LABELS).is_dir():
            labels = source / LABELS
        targets = survey(source, derivatives, settings)
        table = derivatives / "scans.csv"
        given = [f"experiment={experiment}", f"name={name}", f"data.table={table}", *overrides]
        given = [*_probes(targets, overrides), *quote_overrides(given)]
        config = _compose("train", ["stage=aekl", *given])  # a mistyped override is found before anything is made
        preprocess_folder(source, derivatives, settings, labels=labels, workers=workers)
        shared = quote_overrides([text for text in overrides if text.startswith(SHARED)])
        weights = {} if start == "none" else prepare_start(start, config.paths.runs, shared)
        train_and_evaluate(given, weights)


def check_names(name: str, start: str, labels: Path | None) -> None:
    """Refuse names and folders that cannot be right.

    Raises:
        UserError: says which.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise UserError(f"--name {name}: give a name of letters, digits, '_', '.' and '-'")
    if name == start:
        raise UserError(f"--name {name} is the run on phantoms that training starts from: choose another name")
    if labels is not None and not labels.is_dir():
        raise UserError(f"--labels {labels}: there is no such folder")


def survey(source: Path, out: Path, settings: Sequence[str]) -> list[Target]:
    """What can be evaluated in the scans of `source`, which is read but not changed.

    Raises:
        UserError: there are no scans, too few subjects, no labels, or `out` has files of other programs.
    """
    from ldae.commands.preprocess_folder import prepare_folder

    scans, participants, _ = prepare_folder(source, out, settings, None, "first")
    found = participants.look_up_all(scans)
    if participants.reason_empty:
        raise UserError(participants.reason_empty)
    return choose_targets([scan.subject for scan in scans], found, source)


def prepare_start(start: str, runs: str, overrides: Sequence[str]) -> dict[str, Path]:
    """Weights of stages 1 and 2 of `start`, by stage. What is not trained to its end is trained, on phantoms.

    Args:
        start: name of the run and of its experiment.
        runs: folder of the runs.
        overrides: of its training.
    """
    from ldae.experiment import encode, train
    from ldae.runs import Workspace

    space, given = Workspace(Path(runs) / start), [f"experiment={start}", f"name={start}", *overrides]
    if not all(is_finished(space, stage) for stage in FROM_PHANTOMS):
        log.info("stages 1 and 2 are trained on phantoms first, as %s", space.root)
        train(_compose("train", ["stage=aekl", *given]))
        encode(_compose("encode_latents", given))
        train(_compose("train", ["stage=pretrain", *given]))
    names = {"aekl": "autoencoder", "pretrain": "unet"}
    return {stage: space.predecessor(stage).weights_file(names[stage]) for stage in FROM_PHANTOMS}


def is_finished(space: "Workspace", stage: str) -> bool:
    """Whether a stage has been trained to its last step: by its newest checkpoint, if it has any."""
    run = space.stage(stage)
    if not run.published:
        return False
    steps = [int(path.stem.removeprefix("step_")) for path in (run.path / "state").glob("step_*.json")]
    total = run.config.trainer.max_steps
    return not steps or total is None or max(steps) >= total


def train_and_evaluate(given: Sequence[str], weights: dict[str, Path]) -> None:
    """The three stages, the latents between them and the evaluation; each is resumed, or found to be finished.

    Args:
        given: overrides of all of them.
        weights: files that stages start from.
    """
    from ldae.experiment import encode, evaluate, train
    from ldae.runs import open_workspace
    from ldae.utils.files import file_sha256, read_json, write_json
    from ldae.utils.overrides import quote_overrides

    for stage in ("aekl", "pretrain", "repr"):
        initial = [f"stage.initial_weights={weights[stage]}"] if stage in weights else []
        log.info("stage %s", stage)
        train(_compose("train", [f"stage={stage}", *quote_overrides(initial), *given]))
        if stage == "aekl":
            encode(_compose("encode_latents", given))
    config = _compose("evaluate", given)
    space = open_workspace(config)
    stages = {stage: space.stage(stage).metadata["weights"] for stage in ("aekl", "pretrain", "repr")}
    what = {"weights": stages, "table": file_sha256(Path(config.data.table)), "settings": _digest(config)}
    metrics, record = space.evaluation / "metrics.json", space.root / EVALUATED
    if not (metrics.exists() and record.exists() and read_json(record) == what):
        evaluate(config)
        write_json(record, what)
    click.echo(os.path.relpath(metrics))


def _digest(config: "DictConfig") -> str:
    """Hash of the settings on which the results of the evaluation depend."""
    from omegaconf import OmegaConf

    texts = [OmegaConf.to_yaml(config[key], resolve=True) for key in ("evaluation", "probe", "sampler", "data")]
    return hashlib.sha256("\n".join([*texts, str(config.seed)]).encode()).hexdigest()


def _probes(targets: Sequence[Target], overrides: Sequence[str]) -> list[str]:
    """Overrides that choose the probes, unless the user has."""
    if any(text.startswith("probe=") for text in overrides):
        return []
    chosen = ",".join(target.name for target in targets)
    return [f"probe=[{chosen}]", *(text for target in targets for text in target.overrides())]


def _compose(name: str, overrides: Sequence[str]) -> "DictConfig":
    """Compose conf/`name`.yaml, and refuse arguments that a class does not take."""
    from ldae.config import check_constructor_arguments, compose_config

    config = compose_config(name, overrides)
    check_constructor_arguments(config)
    return config
