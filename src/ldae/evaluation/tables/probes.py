"""The tables of probes: what y predicts, beside every baseline, for each way of testing."""

import re
from collections.abc import Mapping, Sequence

from ldae.evaluation.comparisons import NAMES
from ldae.evaluation.first_screen.names import PREFIX, PROBE
from ldae.evaluation.tables import published
from ldae.evaluation.tables.layout import THEN, Cell, Column, Row, Table
from ldae.evaluation.tables.sources import Measured, Sources

BASELINE = re.compile(PREFIX + r"baseline/(?P<baseline>[^/]+)/[^/]+/(?:auc|mae)")
METRICS = {"auc": ("auc", "accuracy"), "mae": ("mae", "rmse")}  # main metric -> those that are shown
TITLES = {"auc": "AUC", "accuracy": "accuracy", "mae": "mean absolute error", "rmse": "RMSE"}
SUPERVISED, VOXEL = "supervised", "the same in voxel space"
OURS = "y"
VOXEL_COMMAND = "make voxel-twin"
REGIMES = {
    "": "test split",
    "cv/inductive/": "cross-validated, the encoder saw none of these scans",
    "cv/transductive/": "cross-validated, the encoder saw these scans without labels",
    "seeds/": "mean over runs with several seeds",
}
NOTES = (
    "In brackets: 95 % intervals of a bootstrap over subjects. 'y better by' is paired on the same resamples; positive "
    "means that y is better.",
    "The paper's age error and AUC are of ADNI; its supervised RMSE averages batches of 4.",
)


def build_probes(sources: Sources) -> list[Table]:
    """One table for each way of testing that was measured; that of the test split also says what is missing."""
    metrics = sources.run.metrics
    prefixes = list(dict.fromkeys(match["prefix"] for name in sorted(metrics) if (match := PROBE.fullmatch(name))))
    prefixes.sort(key=lambda prefix: (prefix not in REGIMES, list(REGIMES).index(prefix) if prefix in REGIMES else 0))
    return [_build(sources, prefix) for prefix in prefixes or [""]]


def _build(sources: Sources, prefix: str) -> Table:
    run, probes = sources.run, _find_probes(sources.run.metrics, prefix) or {"diagnosis": "auc", "age": "mae"}
    columns, fields = _columns(probes)
    rows = [Row(OURS, _cells(run.metrics, f"{prefix}probe/", "", fields), run.name, run.command("probes"))]
    found = {
        match["baseline"] for name in run.metrics if (match := BASELINE.fullmatch(name)) and match["prefix"] == prefix
    }
    for baseline in sorted(
        found, key=lambda each: (each not in NAMES, list(NAMES).index(each) if each in NAMES else 0)
    ):
        label = NAMES.get(baseline, baseline)
        rows.append(Row(label, _cells(run.metrics, f"{prefix}baseline/{baseline}/", "", fields), run.name))
    rows += _other_runs(sources, prefix, fields)
    if prefix == "":
        rows += _missing(sources, found, len(columns))
        rows += [
            published.published_row(label, [_published_cell(values, field) for field in fields])
            for label, values in published.PROBES.items()
        ]
    title = f"What y predicts: {REGIMES.get(prefix, f'another cohort ({prefix[:-1]})')}"
    return Table(f"probes_{prefix.replace('/', '_')}".rstrip("_"), title, columns, rows, NOTES)


def _find_probes(metrics: Mapping[str, float], prefix: str) -> dict[str, str]:
    """Main metric of each probe, that of the diagnosis and of age first."""
    found = {
        match["probe"]: match["metric"]
        for name in sorted(metrics)
        if (match := PROBE.fullmatch(name)) and match["prefix"] == prefix
    }
    first = [name for name in ("diagnosis", "age") if name in found]
    return {name: found[name] for name in [*first, *(name for name in found if name not in first)]}


def _columns(probes: Mapping[str, str]) -> tuple[list[Column], list[str]]:
    """Columns, and what the names of their metrics end with."""
    columns, fields = [], []
    for probe, main in probes.items():
        digits = 3 if main == "auc" else 2
        for metric in METRICS[main]:
            columns.append(Column(f"{probe}: {TITLES[metric]}", digits))
            fields.append(f"{probe}/{metric}")
        columns.append(Column(f"{probe}: y better by", digits))
        fields.append(f"{probe}/{main}_difference")
    return columns, fields


def _cells(metrics: Mapping[str, float], start: str, end: str, fields: Sequence[str]) -> list[Cell | None]:
    return [Cell.read(metrics, f"{start}{field}{end}") for field in fields]


def _published_cell(values: Mapping[str, float], field: str) -> Cell | None:
    return Cell(values[field]) if field in values else None


def _other_runs(sources: Sources, prefix: str, fields: Sequence[str]) -> list[Row]:
    """y of the runs beside this one that have the same split; those in voxel space are called so."""
    rows = []
    for sibling in sources.siblings:
        cells = _cells(sibling.metrics, f"{prefix}probe/", "", fields)
        label = f"{OURS}, {VOXEL}" if sibling in sources.voxel_twins else OURS
        if any(cells):
            rows.append(Row(label, cells, sibling.name))
    return rows


def _missing(sources: Sources, found: set[str], width: int) -> list[Row]:
    """What the paper compares with and this run has not measured."""
    run, nothing = sources.run, [None] * width
    rows = []
    if SUPERVISED not in found:
        rows.append(Row(NAMES.get(SUPERVISED, SUPERVISED), nothing, run.name, supervise_command(run)))
    if not run.in_voxel_space and not any(_has_probes(twin) for twin in sources.voxel_twins):
        rows.append(Row(f"{OURS}, {VOXEL}", nothing, "voxels", VOXEL_COMMAND))
    return rows


def _has_probes(run: Measured) -> bool:
    return any(name.startswith("probe/") for name in run.metrics)


def supervise_command(run: Measured) -> str:
    """The commands that train the supervised twin of y and score it."""
    return f"{run.train_command('stage=supervised', 'task=diagnosis')}{THEN}{run.command('probes')}"
