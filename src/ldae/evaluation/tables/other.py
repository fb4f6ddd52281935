"""The tables of interpolation, forecasts, generation and speed."""

import re
from collections.abc import Mapping, Sequence

from ldae.evaluation.tables import published
from ldae.evaluation.tables.layout import Cell, Column, Row, Table
from ldae.evaluation.tables.sources import STAGES, Sources

METHODS = {"ldae": "ours", "nearest": "nearest visit", "voxel": "blend of scans", "latent": "blend of latents"}
QUALITIES = {"ssim": "SSIM", "ssim_mask": "SSIM in the brain"}
GAP = re.compile(r"interpolation/ldae/real/ssim_gap(?P<months>\d+)")
TASKS = {
    "encode": "compress a scan",
    "embed": "embed it, y",
    "invert": "invert it, z_T",
    "sample": "decode a latent from z_T and y",
    "decode": "decompress it",
    "counterfactual": "a counterfactual, from scan to scan",
}


def build_interpolation(sources: Sources) -> Table:
    """The visit between two visits, by months between them; all methods against the real visit."""
    run, metrics = sources.run, sources.run.metrics
    months = sorted({*published.INTERPOLATION_SSIM, *(int(m["months"]) for n in metrics if (m := GAP.fullmatch(n)))})
    columns = [*(Column(f"{number} months") for number in months), Column("all")]
    rows = []
    for quality, words in QUALITIES.items():
        for method, label in METHODS.items():
            stem = f"interpolation/{method}/real/{quality}"
            cells = [*(Cell.read(metrics, f"{stem}_gap{number:02d}") for number in months), Cell.read(metrics, stem)]
            rows.append(Row(f"{words}; {label}", cells, run.name, run.command("interpolation")))
    paper = [*(published.INTERPOLATION_SSIM.get(number) for number in months), None]
    rows.append(published.published_row("SSIM; LDAE", paper))
    notes = (
        "Against the real visit. The paper's figures are SSIM of the whole volume, scored against the target as the "
        "autoencoder reconstructs it, which is easier.",
    )
    return Table("interpolation", "Interpolation through time, by months between the visits", columns, rows, notes)


def build_generation(sources: Sources) -> Table:
    """Unconditional samples, beside real scans."""
    run, metrics = sources.run, sources.run.metrics
    spaces = sorted({name.split("/")[1] for name in metrics if re.fullmatch(r"generation/\w+/fid", name)})
    names = [f"{space}/{metric}" for space in spaces or ["own_encoder"] for metric in ("fid", "mmd")]
    titles = {"fid": "Frechet distance", "mmd": "MMD"}
    columns = [Column(f"{titles[name.split('/')[1]]}, {name.split('/')[0].replace('_', ' ')}") for name in names]
    columns.append(Column("MS-SSIM of pairs"))
    rows = [
        Row(label, [Cell.read(metrics, f"generation/{name}{end}") for name in [*names, "ms_ssim"]], run.name, command)
        for label, end, command in (
            ("samples", "", run.command("generation")),
            ("training scans, what a perfect generator would reach", "_real", run.command("generation")),
        )
    ]
    notes = ("Distances to the test scans, lower is better; MS-SSIM between samples, lower is more diverse.",)
    return Table("generation", "Unconditional generation", columns, rows, notes)


def build_speed(sources: Sources) -> Table:
    """Seconds of this machine, and the factor to voxel space."""
    bench, run, command = sources.bench, sources.run, "make bench"
    rows = [
        Row(f"training loop, {words}", [Cell.read(sources.seconds, stage), None], run.name, _train(run.name, stage))
        for stage, words in STAGES.items()
    ]
    for task, words in TASKS.items():
        seconds = {name: value / 1000 for name, value in bench.items()}
        rows.append(Row(f"{words}", [Cell.read(seconds, f"{task}/ms"), None], "bench", command))
    full, reduced = "voxels/full/over_voxel_space_flop", "speedup/over_voxel_space"
    rows += [
        Row("voxel space, timed at a reduced size", [None, Cell.read(bench, reduced)], "bench", command),
        Row("voxel space, operations at full size", [None, Cell.read(bench, full)], "bench", command),
        published.published_row("voxel space", [None, Cell(published.OVER_VOXEL_SPACE)]),
    ]
    notes = (
        "Wall seconds of the training loop by its own log, without the time between two starts. The bench's sizes are "
        "those of its own config, not this run's; one scan at a time.",
    )
    columns = [Column("seconds", 2), Column("times faster than it", 1)]
    return Table("speed", "Speed", columns, rows, notes)


def _train(name: str, stage: str) -> str:
    return f"python train.py stage={stage} name={name}"


def build_forecast(sources: Sources) -> Table:
    """Later visits predicted from earlier ones: every metric of `forecast/` with its interval."""
    metrics = sources.run.metrics
    names = [n for n in sorted(metrics) if n.startswith("forecast/") and not _is_interval_end(n, metrics)]
    rows: Sequence[Row] = [Row(n.removeprefix("forecast/"), [Cell.read(metrics, n)], sources.run.name) for n in names]
    if not rows:
        rows = [Row("later visits from earlier ones", [None], sources.run.name, sources.run.command("forecast"))]
    return Table("forecast", "Forecasts", [Column("value")], rows)


def _is_interval_end(name: str, metrics: Mapping[str, float]) -> bool:
    stem = re.sub(r"_(low|high)$", "", name)
    return stem != name and stem in metrics
