"""Several runs that differ in their seed, as one result: the mean over the runs, and how far they are apart.

Every number that all runs have in their metrics.json becomes

- `seeds/<metric>`: its mean over the runs
- `seeds/<metric>_lowest`, `seeds/<metric>_highest`: the range over the runs

For probes and baselines, `_low` and `_high` are the 95 % interval of that mean. It is a bootstrap over subjects of the
runs' stored predictions, in which each resample has the same subjects in every run. So a difference between y and a
baseline is paired by subject and averaged over seeds. `seeds/runs` counts the runs.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ldae.evaluation.context import Context
from ldae.evaluation.probes.cross_validation import REGIMES, average_scores, refuse_outdated
from ldae.evaluation.probes.predictors import metrics_by_name
from ldae.evaluation.probes.targets import Probe
from ldae.utils.errors import UserError
from ldae.utils.results_record import read_metrics

log = logging.getLogger(__name__)

PREFIX = "seeds/"
# What the names of metrics of a probe begin with: what the name of the file with its predictions begins with.
PREDICTIONS = {"": "", **{f"cv/{regime}/": f"cv_{regime}_" for regime in REGIMES}}
INTERVAL_ENDS = ("_low", "_high")


class Seeds:
    """The results of finished runs with different seeds, averaged.

    Args:
        probes: by name.
        runs: folders runs/<name>, two or more, each with results of the same evaluations.
        resamples: of the bootstrap over subjects.
    """

    def __init__(self, probes: Mapping[str, Probe], runs: Sequence[str | Path], resamples: int = 1000):
        self.probes, self.runs, self.resamples = dict(probes or {}), [Path(run) for run in runs], resamples

    def __call__(self, context: Context) -> Iterator[tuple[str, float]]:
        if len(set(self.runs)) < 2:
            raise UserError(f"evaluation.seeds.runs={[str(run) for run in self.runs]}: two different runs are needed")
        yield f"{PREFIX}runs", float(len(self.runs))
        yield from self._ranges()
        for name, probe in self.probes.items():
            for prefix, start in PREDICTIONS.items():
                repeats = self._read(f"{start}{name}_predictions.csv")
                if repeats:
                    yield from self._score(context, name, probe, repeats, f"{PREFIX}{prefix}")

    def _ranges(self) -> Iterator[tuple[str, float]]:
        """Mean, lowest and highest of every metric that all runs have."""
        found = []
        for run in self.runs:
            refuse_outdated(run)
            metrics = read_metrics(run / "evaluation")
            if not metrics:
                command = f"python evaluate.py name={run.name} ..."
                raise UserError(f"no results in {run / 'evaluation'}: run `{command}` first")
            found.append({name: value for name, value in metrics.items() if not name.startswith(PREFIX)})
        for name in sorted(set.intersection(*map(set, found))):
            if not name.endswith(INTERVAL_ENDS):
                values = [metrics[name] for metrics in found]
                yield f"{PREFIX}{name}", float(np.mean(values))
                yield f"{PREFIX}{name}_lowest", min(values)
                yield f"{PREFIX}{name}_highest", max(values)

    def _read(self, file: str) -> list[pd.DataFrame]:
        """The repeats of all runs in a file of predictions, in the same order of scans; none if a run lacks the file.

        Raises:
            UserError: two runs predicted different scans.
        """
        paths = [run / "evaluation" / file for run in self.runs]
        if not all(path.exists() for path in paths):
            return []
        repeats: list[pd.DataFrame] = []
        for path in paths:
            table = pd.read_csv(path, dtype={"subject": str, "session": str})
            for _, part in table.groupby("repeat") if "repeat" in table else [(0, table)]:
                repeats.append(part.sort_values(["subject", "session"]).reset_index(drop=True))
                if not repeats[-1][["subject", "session"]].equals(repeats[0][["subject", "session"]]):
                    raise UserError(f"evaluation.seeds.runs: {path} and {paths[0]} have predictions of different scans")
        return repeats

    def _score(
        self, context: Context, name: str, probe: Probe, repeats: Sequence[pd.DataFrame], prefix: str
    ) -> Iterator[tuple[str, float]]:
        """Metrics of the predictors that all runs have, averaged over runs and repeats."""
        keys = [column for column in repeats[0] if all(column in part for part in repeats)]
        scores = average_scores(context, probe, keys, repeats, self.resamples)
        yield from metrics_by_name(scores, name, probe, repeats[0], prefix)
