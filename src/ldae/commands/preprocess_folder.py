"""Preprocessing of a folder or list of scans, as `ldae preprocess` and the jobs of --launcher do it."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldae.utils.errors import UserError
from ldae.utils.shards import Shard

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from ldae.preprocessing.job import Job
    from ldae.preprocessing.participants import Participants
    from ldae.preprocessing.sources import SourceScan

log = logging.getLogger(__name__)

ALREADY_REGISTERED = (
    "some file names have a space- entity, so these scans may already be registered: "
    "--registration none leaves them in their space"
)


def compose_steps(overrides: Sequence[str] = ()) -> "DictConfig":
    """Compose conf/preprocess.yaml with Hydra overrides.

    Raises:
        UserError: an override does not compose.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from ldae.config import check_constructor_arguments, compose_config

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
    shard: Shard | None = None,
    merge: bool = False,
) -> None:
    """Preprocess every scan of `source` into the folder `out`.

    Args:
        overrides: Hydra overrides of conf/preprocess.yaml.
        labels, workers, threads: see ldae.preprocessing.preprocess_cohort.
        participants: participants.tsv, if it is not in `source`.
        run: which scan of a session is used, see ldae.preprocessing.session_scans.
        shard: the part of the scans that this job does; None: all.
        merge: only write the tables of what other jobs have done.

    Raises:
        UserError: `source` has no scans, the steps cannot be combined, the disk cannot be written, or the tables of
            participants give no scan an age or a diagnosis.
    """
    from ldae.preprocessing.cohort_plan import plan_cohort
    from ldae.preprocessing.preprocess_cohort import merge_tables, preprocess_cohort

    scans, participant_table, job = prepare_folder(source, out, overrides, participants, run)
    if merge:
        if not (out / "records").is_dir():
            raise UserError(f"{out} has no records of preprocessed scans: run the shards first")
        table = merge_tables(plan_cohort(scans, participant_table, job, labels), job)
    else:
        table = preprocess_cohort(scans, participant_table, job, labels, workers, threads, shard=shard)
    if participant_table.reason_empty and table is not None:
        raise UserError(f"{participant_table.reason_empty}; the scans in {out} are kept")


def prepare_folder(
    source: Path, out: Path, overrides: Sequence[str], participants: Path | None, run: str
) -> "tuple[Sequence[SourceScan], Participants, Job]":
    """List the scans and check everything, before anything is written. The arguments are as in `preprocess_folder`."""
    from hydra.utils import instantiate

    from ldae.preprocessing.bids_names import bids_entity
    from ldae.preprocessing.job import Job
    from ldae.preprocessing.output_folder import check_output
    from ldae.preprocessing.participants import Participants
    from ldae.preprocessing.session_scans import CHOICES
    from ldae.preprocessing.sources import find_scans
    from ldae.preprocessing.steps import PreprocessingSteps, check_installed

    steps = instantiate(compose_steps(overrides), _convert_="all")
    regions, columns = steps.pop("regions"), steps.pop("columns")
    job = Job(PreprocessingSteps(**steps), out, regions, CHOICES[run], os.path.relpath(source, out))
    check_installed(job.steps)
    scans = find_scans(source)
    check_output(source, out, scans)
    log.info("%d scans in %s", len(scans), source)
    if job.steps.registration and any(bids_entity(scan.path.name, "space") for scan in scans):
        log.warning(ALREADY_REGISTERED)
    return scans, Participants(source if source.is_dir() else None, columns, participants), job
