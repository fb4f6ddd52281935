"""`ldae preprocess`: preprocess raw scans for training."""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ldae.commands.options import orientation_option

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)

ALREADY_REGISTERED = (
    "some file names have a space- entity, so these scans may already be registered: "
    "--registration none leaves them in their space"
)


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--bias", help="Bias field correction: n4, none.")
@click.option("--brain", help="Brain extraction: deepbet, stripped (already done), none.")
@click.option("--registration", help="Registration to the template: rigid, affine, syn, none (already done).")
@click.option("--intensity", help="Intensity normalisation: none, white_matter, tissues.")
@click.option("--regions", help="Volumes measured in label maps: dlmuse, labels.")
@click.option("--spacing", help="Voxel size of the result in mm, null for the template's own; default: 1.5.")
@click.option(
    "--run",
    type=click.Choice(["first", "last", "best"]),
    default="first",
    show_default=True,
    help="Which T1w scan of a session is used if it has several.",
)
@click.option("--labels", type=click.Path(path_type=Path), help="Folder of label maps *_dseg.nii.gz in native space.")
@click.option(
    "--participants",
    type=click.Path(path_type=Path),
    help="participants.tsv; default: the one in SOURCE. For a CAPS tree or a CSV, give that of the BIDS dataset.",
)
@orientation_option
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set any value of conf/preprocess.")
@click.option(
    "-j", "--workers", default=None, type=click.IntRange(1), help="Number of processes; default: one for each core."
)
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1), help="Number of threads in each process."
)
def preprocess(source: Path, output: Path, overrides: tuple[str, ...], **options: Any) -> None:
    """Preprocess raw T1w scans for training, and write a table and a page for quality control.

    SOURCE is a BIDS dataset, a Clinica CAPS tree, or a CSV with a column `path`. OUTPUT becomes a folder of BIDS
    derivatives with scans.csv, rejected.csv (rejected scans with the reason) and qc.html. The same command continues
    where an earlier one stopped.
    """
    groups = ("bias", "brain", "registration", "intensity", "regions")
    chosen = [f"preprocess/{name}={options[name]}" for name in groups if options[name]]
    chosen += [f"preprocess.spacing={options['spacing']}"] if options["spacing"] else []
    chosen += [f"preprocess.assume_orientation={options['orientation']}"] if options["orientation"] else []
    others = {name: options[name] for name in ("labels", "participants", "workers", "threads", "run")}
    preprocess_folder(source, output, [*chosen, *overrides], **others)
    click.echo(output / "scans.csv")


def compose_steps(overrides: Sequence[str] = ()) -> "DictConfig":
    """Compose conf/preprocess.yaml with Hydra overrides.

    Raises:
        UserError: an override does not compose.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from ldae.config import check_constructor_arguments, compose_config
    from ldae.utils.errors import UserError

    try:
        config = compose_config("preprocess", overrides)
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
    run: str = "first",
) -> None:
    """Preprocess every scan of `source` into the folder `out`.

    Args:
        overrides: Hydra overrides of conf/preprocess.yaml.
        labels, workers, threads: see ldae.preprocessing.preprocess_cohort.
        participants: participants.tsv, if it is not in `source`.
        run: which scan of a session is used, see ldae.preprocessing.session_scans.

    Raises:
        UserError: `source` has no scans, the steps cannot be combined, the disk cannot be written, or the tables of
            participants give no scan an age or a diagnosis.
    """
    from hydra.utils import instantiate

    from ldae.preprocessing.bids_names import bids_entity
    from ldae.preprocessing.job import Job
    from ldae.preprocessing.output_folder import check_output
    from ldae.preprocessing.participants import Participants
    from ldae.preprocessing.preprocess_cohort import preprocess_cohort
    from ldae.preprocessing.session_scans import CHOICES
    from ldae.preprocessing.sources import find_scans
    from ldae.preprocessing.steps import PreprocessingSteps, check_installed
    from ldae.utils.errors import UserError

    steps = instantiate(compose_steps(overrides), _convert_="all")
    regions, columns = steps.pop("regions"), steps.pop("columns")
    job = Job(PreprocessingSteps(**steps), out, regions, CHOICES[run], os.path.relpath(source, out))
    check_installed(job.steps)
    scans = find_scans(source)
    check_output(source, out, scans)
    log.info("%d scans in %s", len(scans), source)
    if job.steps.registration and any(bids_entity(scan.path.name, "space") for scan in scans):
        log.warning(ALREADY_REGISTERED)
    participant_table = Participants(source if source.is_dir() else None, columns, participants)
    # Schedulers interrupt by SIGTERM: exit through an exception, so that the tables of the finished scans are written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    preprocess_cohort(scans, participant_table, job, labels, workers, threads)
    if participant_table.reason_empty:
        raise UserError(f"{participant_table.reason_empty}; the scans in {out} are kept")
