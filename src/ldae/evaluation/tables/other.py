"""The tables of interpolation, forecasts, generation and speed."""

import re

from ldae.evaluation.edits.forecast_figures import LABELS as FORECAST_METHODS
from ldae.evaluation.edits.interpolation import LABELS as METHODS
from ldae.evaluation.tables import published
from ldae.evaluation.tables.layout import Cell, Column, Row, Table
from ldae.evaluation.tables.sources import STAGES, Sources

QUALITIES = {"ssim": "SSIM", "ssim_mask": "SSIM in the brain"}
FORECAST = re.compile(r"forecast/(?P<method>\w+)/real/(?:ssim_mask|ventricle_error)(?:_gap(?P<months>\d+))?")
FORECASTS = {
    "ssim_mask": ("SSIM in the brain", 3),
    "ventricle_error": ("error of the ventricles", 0),
    "hippocampus_error": ("error of the hippocampi", 0),
}
GAP = re.compile(r"interpolation/ldae/real/ssim_gap(?P<months>\d+)")
RECONSTRUCT = {"reconstruct": "reconstruct a scan from z_T and y"}
GENERATORS = (  # what the names of metrics begin with, words, what they end with
    ("generation", "samples of the U-Net alone", ""),
    ("generation/gaussian", "y from a Gaussian, then a scan", ""),
    ("generation/prior", "y from the prior, then a scan", ""),
    ("generation", "training scans, what a perfect generator would reach", "_real"),
)
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
    measured, rows = any(name.startswith("interpolation/") for name in metrics), []
    for quality, words in QUALITIES.items():
        for method, label in METHODS.items():
            stem = f"interpolation/{method}/real/{quality}"
            cells = [*(Cell.read(metrics, f"{stem}_gap{number:02d}") for number in months), Cell.read(metrics, stem)]
            if any(cells) or not measured:
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
    spaces = sorted({name.split("/")[1] for name in metrics if re.fullmatch(r"generation/\w+/fid_real", name)})
    names = [f"{space}/{metric}" for space in spaces or ["own_encoder"] for metric in ("fid", "mmd")]
    titles = {"fid": "Frechet distance", "mmd": "MMD"}
    columns = [Column(f"{titles[name.split('/')[1]]}, {name.split('/')[0].replace('_', ' ')}") for name in names]
    columns.append(Column("MS-SSIM of pairs"))
    names.append("ms_ssim")
    rows = []
    for stem, label, end in GENERATORS:
        cells = [Cell.read(metrics, f"{stem}/{name}{end}") for name in names]
        rows.append(Row(label, cells, run.name, run.command("generation")))
    notes = ("Distances to the test scans, lower is better; MS-SSIM between samples, lower is more diverse.",)
    return Table("generation", "Unconditional generation", columns, rows, notes)


def build_forecast(sources: Sources) -> Table:
    """Later visits from earlier ones, by months between them, beside what needs no model."""
    run, metrics = sources.run, sources.run.metrics
    found = [match for name in metrics if (match := FORECAST.fullmatch(name)) and match["method"] in FORECAST_METHODS]
    months = sorted({int(match["months"]) for match in found if match["months"]})
    columns = [*(Column(f"{number} months") for number in months), Column("all")]
    rows = []
    for metric, (words, digits) in FORECASTS.items():
        for method, label in FORECAST_METHODS.items():
            stem = f"forecast/{method}/real/{metric}"
            cells = [*(Cell.read(metrics, f"{stem}_gap{number:02d}") for number in months), Cell.read(metrics, stem)]
            if any(cells) or not found:
                rows.append(Row(f"{words}; {label}", cells, run.name, run.command("forecast"), digits))
    notes = ("Against the later scan as it was measured. Structures' errors are of volumes, in mm3: lower is better.",)
    return Table("forecast", "Later visits from earlier ones, by months between them", columns, rows, notes)


def build_speed(sources: Sources) -> Table:
    """Seconds of this machine, and the factor to voxel space."""
    bench, run, command = sources.bench, sources.run, "make bench"
    rows = [
        Row(
            f"training, {words}",
            [Cell.read(sources.seconds, stage), None],
            run.name,
            run.train_command(f"stage={stage}"),
        )
        for stage, words in STAGES.items()
    ]
    for one in (run, *sources.voxel_twins):
        for name, words in {"train/total": "training, all stages", "embed": "embed a scan", **RECONSTRUCT}.items():
            cell, factor = Cell.read(one.metrics, f"seconds/{name}"), None
            if one is not run and cell and f"seconds/{name}" in run.metrics:
                factor = Cell(cell.value / run.metrics[f"seconds/{name}"])
            where = " in voxel space" if one is not run else ""
            rows.append(Row(f"{words}{where}", [cell, factor], one.name, one.command("seconds")))
    in_seconds = {name: value / 1000 for name, value in bench.items()}
    rows += [
        Row(f"bench: {words}", [Cell.read(in_seconds, f"{task}/ms"), None], "bench", command)
        for task, words in TASKS.items()
    ]
    full, reduced = "voxels/full/over_voxel_space_flop", "speedup/over_voxel_space"
    rows += [
        Row("bench: voxel space, timed at a reduced size", [None, Cell.read(bench, reduced)], "bench", command),
        Row("bench: voxel space, operations at full size", [None, Cell.read(bench, full)], "bench", command),
        published.published_row("voxel space, inference", [None, Cell(published.OVER_VOXEL_SPACE)]),
    ]
    notes = (
        "Wall seconds of the training loops, and of one scan at a time. The bench's sizes are those of its own config. "
        "The last column says how many times faster latents are than voxels.",
    )
    return Table("speed", "Speed", [Column("seconds", 2), Column("faster than voxels, times", 1)], rows, notes)
