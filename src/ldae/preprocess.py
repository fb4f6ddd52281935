"""What `ldae preprocess` does: compose conf/preprocess.yaml, build the steps, and send every scan through them."""

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from ldae.config import check_targets, conf_dir, register
from ldae.errors import UserError
from ldae.preprocessing.cohort import preprocess as run
from ldae.preprocessing.job import Job
from ldae.preprocessing.names import entity
from ldae.preprocessing.people import People
from ldae.preprocessing.pipeline import Pipeline
from ldae.preprocessing.sources import find_scans

log = logging.getLogger(__name__)


def settings(overrides: Sequence[str] = ()) -> DictConfig:
    """The composed steps. Raises UserError for an override that does not compose."""
    register()
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose("preprocess", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{' '.join(overrides)}: {text[:300]}") from error
    check_targets(config)
    return config.preprocess


def preprocess(
    source: Path,
    out: Path,
    overrides: Sequence[str] = (),
    labels: Path | None = None,
    participants: Path | None = None,
    workers: int | None = None,
    threads: int = 1,
) -> None:
    """Prepare every scan of `source` into `out`; see ldae.preprocessing.cohort.

    Raises:
        UserError: nothing to read, steps that do not go together, or a disk that cannot be written.
    """
    steps = instantiate(settings(overrides), _convert_="all")
    regions, columns = steps.pop("regions"), steps.pop("columns")
    job = Job(Pipeline(**steps), out, regions)
    scans = find_scans(source)
    log.info("%d scans in %s", len(scans), source)
    if job.pipeline.registration and any(entity(scan.path.name, "space") for scan in scans):
        log.warning("names that tell a space may be registered already: --registration none keeps them as they are")
    people = People(source if source.is_dir() else None, columns, participants)
    # A scheduler's way to interrupt: tables of what is done are written then, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run(scans, people, job, labels, workers, threads)
