"""`ldae preprocess`: raw scans in, scans that models take out."""

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--bias", help="Bias field: n4, none.")
@click.option("--brain", help="Brain extraction: deepbet, stripped (it is done already), none.")
@click.option("--registration", help="To the template: rigid, affine, syn, none (it is done already).")
@click.option("--intensity", help="Normalisation: none, white_matter, tissues.")
@click.option("--regions", help="What is counted in label maps: dlmuse, labels.")
@click.option("--spacing", help="Voxel size in mm of the result, or null for the template's; 1.5 by default.")
@click.option("--labels", type=click.Path(path_type=Path), help="Folder of label maps *_dseg.nii.gz in native space.")
@click.option(
    "--participants",
    type=click.Path(path_type=Path),
    help="Default: participants.tsv in SOURCE. For a CAPS tree or a CSV: that of the BIDS dataset.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any value of conf/preprocess.")
@click.option("-j", "--workers", default=None, type=click.IntRange(1), help="Processes; default: one a core.")
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1), help="Threads a process.")
def preprocess(source: Path, output: Path, overrides: tuple[str, ...], **options: Any) -> None:
    """Turn raw T1w scans into scans that models take, a table, and a page for quality control.

    SOURCE is a BIDS dataset, a Clinica CAPS tree, or a CSV with a column `path`. OUTPUT becomes BIDS derivatives with
    scans.csv, rejected.csv (what was set aside, and why) and qc.html. The same command again goes on where it stopped.
    """
    groups = ("bias", "brain", "registration", "intensity", "regions")
    chosen = [f"preprocess/{name}={options[name]}" for name in groups if options[name]]
    chosen += [f"preprocess.spacing={options['spacing']}"] if options["spacing"] else []
    others = {name: options[name] for name in ("labels", "participants", "workers", "threads")}
    preprocess_folder(source, output, [*chosen, *overrides], **others)
    click.echo(output / "scans.csv")


def compose_steps(overrides: Sequence[str] = ()) -> "DictConfig":
    """Compose conf/preprocess.yaml with Hydra overrides.

    Raises:
        UserError: an override does not compose.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from ldae.config import check_constructor_arguments, conf_dir, register
    from ldae.utils.errors import UserError

    register()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose("preprocess", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{' '.join(overrides)}: {text[:300]}") from error
    check_constructor_arguments(config)
    return config.preprocess


def preprocess_folder(
    source: Path,
    out: Path,
    overrides: Sequence[str] = (),
    labels: Path | None = None,
    participants: Path | None = None,
    workers: int | None = None,
    threads: int = 1,
) -> None:
    """Preprocess every scan of `source` into `out`; see ldae.preprocessing.preprocess_cohort.

    Raises:
        UserError: there is nothing to read, the steps do not go together, or the disk cannot be written.
    """
    from hydra.utils import instantiate

    from ldae.preprocessing.bids_names import bids_entity
    from ldae.preprocessing.job import Job
    from ldae.preprocessing.participants import Participants
    from ldae.preprocessing.preprocess_cohort import preprocess_cohort
    from ldae.preprocessing.sources import find_scans
    from ldae.preprocessing.steps import PreprocessingSteps

    steps = instantiate(compose_steps(overrides), _convert_="all")
    regions, columns = steps.pop("regions"), steps.pop("columns")
    job = Job(PreprocessingSteps(**steps), out, regions)
    scans = find_scans(source)
    log.info("%d scans in %s", len(scans), source)
    if job.steps.registration and any(bids_entity(scan.path.name, "space") for scan in scans):
        log.warning(
            "some file names have a space- entity, so these scans may be registered already: "
            "--registration none keeps them as they are"
        )
    people = Participants(source if source.is_dir() else None, columns, participants)
    # A scheduler interrupts by SIGTERM: leave through `finally`, so that the tables of what is done are written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    preprocess_cohort(scans, people, job, labels, workers, threads)
