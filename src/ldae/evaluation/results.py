"""A folder of results that holds only what belongs to the present weights and scans.

An evaluation writes into a folder of its own. Only when it has succeeded do its files and metrics take the place of all
that the same evaluation wrote before, so that a failed one changes nothing and no number or figure of an earlier
setting remains. evaluations.json (utils/results_record.py) says what each was computed from.
"""

import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ldae.evaluation.context import Context, Evaluator
from ldae.evaluation.other_cohort import EXTERNAL
from ldae.utils.entrypoint import describe_command
from ldae.utils.files import write_json
from ldae.utils.locks import lock_of, wait_for_lock
from ldae.utils.results_record import (
    METRICS,
    RECORD,
    Results,
    Source,
    has_embeddings_of,
    read_metrics,
    read_record,
    write_record,
)

log = logging.getLogger(__name__)

OUTDATED = "outdated"  # folder of results of other weights or scans
UNFINISHED = ".unfinished-"  # and the name of an evaluation that is running: its folder
EARLIER = "earlier version"  # entry of the record for metrics that were written without a record


def start_record(folder: Path, encoder: str) -> None:
    """Start a record if an earlier version has written metrics of another encoder, so that they are not adopted.

    To be called before the present encoder's embeddings take the place of those that tell.
    """
    if read_metrics(folder) and not (folder / RECORD).exists() and not has_embeddings_of(folder, encoder):
        write_record(folder, {})


class ResultsFolder:
    """The results in `context.out`. Several processes may run different evaluations in it at the same time."""

    def __init__(self, context: Context) -> None:
        self.context, self.folder, self.source = context, context.out, context.source
        self._read_record()

    def _read_record(self) -> None:
        self.record = read_record(self.folder)
        self._adopt_earlier_metrics()

    def run(self, name: str, evaluator: Evaluator) -> dict[str, float]:
        """Run an evaluation and put its results in the place of its earlier ones; returns its metrics."""
        entry = self.context.prefix.strip("/") or name
        unfinished = self.folder / f"{UNFINISHED}{entry.replace('/', '_')}"
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        unfinished.mkdir(parents=True)
        skipped: list[str] = []
        try:
            metrics = dict(evaluator(replace(self.context, out=unfinished, skipped=skipped)))
            with wait_for_lock(lock_of(self.folder)):
                self._read_record()  # another process may have stored results meanwhile
                self._store(entry, metrics, skipped, unfinished)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        return metrics

    def metrics(self) -> dict[str, float]:
        """The metrics in the folder that the record names."""
        names = {name for results in self.record.values() for name in results.metrics}
        return {name: value for name, value in read_metrics(self.folder).items() if name in names}

    def _adopt_earlier_metrics(self) -> None:
        """Take metrics without a record into it, if the embeddings beside them are of the present encoder."""
        metrics, encoder = read_metrics(self.folder), self.source.weights.get("encoder", "")
        if metrics and not (self.folder / RECORD).exists() and has_embeddings_of(self.folder, encoder):
            self.record[EARLIER] = Results(self.source, list(metrics), [], [])

    def _store(self, entry: str, metrics: Mapping[str, float], skipped: list[str], unfinished: Path) -> None:
        """Store the results of one evaluation in place of its earlier ones, and move outdated ones away."""
        outdated = [name for name, results in self.record.items() if self._is_outdated(name, results.source)]
        if outdated:
            names = ", ".join(sorted(outdated))
            log.warning("results of %s are of other weights or scans: moved to %s", names, self.folder / OUTDATED)
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        files = sorted(path.name for path in unfinished.iterdir())
        outdated_files = {file for name in outdated for file in self.record[name].files}
        outdated_metrics = {name for other in outdated for name in self.record[other].metrics}
        known_files = {file for results in self.record.values() for file in results.files}
        groups = {_group(name) for name in metrics}
        self.record = {
            name: replace(
                results,
                # Metrics without a record are known by the first part of their names only.
                metrics=[
                    m for m in results.metrics if m not in finite and (name != EARLIER or _group(m) not in groups)
                ],
                files=[file for file in results.files if file not in files],
            )
            for name, results in self.record.items()
            if name not in (entry, *outdated)
        }
        remaining, stored = self.metrics(), read_metrics(self.folder)
        self._move_outdated(outdated_files, {name: stored[name] for name in stored.keys() & outdated_metrics})
        self.record[entry] = Results(self.source, list(finite), files, skipped, describe_command())
        for file in files:
            os.replace(unfinished / file, self.folder / file)
        write_json(self.folder / METRICS, remaining | finite)
        write_record(self.folder, self.record)
        for file in known_files - {file for results in self.record.values() for file in results.files}:
            (self.folder / file).unlink(missing_ok=True)

    def _move_outdated(self, files: set[str], metrics: Mapping[str, float]) -> None:
        """Keep results of other weights or scans in a folder of their own, where nothing reads them."""
        if not files and not metrics:
            return
        place = self.folder / OUTDATED
        place.mkdir(exist_ok=True)
        for file in files:
            if (self.folder / file).exists():
                os.replace(self.folder / file, place / file)
        write_json(place / METRICS, dict(sorted(metrics.items())))

    def _is_outdated(self, entry: str, source: Source) -> bool:
        """Whether results are of other weights, or of other scans of the same cohort than the present ones."""
        if source.weights != self.source.weights:
            return True
        is_same_cohort = _cohort_of(entry) == _cohort_of(self.context.prefix)
        return is_same_cohort and (source.rows, source.split_hash) != (self.source.rows, self.source.split_hash)


def _cohort_of(name: str) -> str:
    """The cohort that an entry or a prefix of metrics belongs to: "" for the model's own."""
    parts = name.strip("/").split("/")
    return "/".join(parts) if parts[0] == EXTERNAL else ""


def _group(metric: str) -> str:
    """The first part of a metric's name; the first two for cross-validation, whose regimes are run separately."""
    parts = metric.split("/")
    return "/".join(parts[:2] if parts[0] == "cv" else parts[:1])
