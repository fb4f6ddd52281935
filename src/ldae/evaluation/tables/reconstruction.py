"""The table of reconstructions: quality by number of steps, from the encoded code and y, and from y alone."""

import re
from collections.abc import Mapping, Sequence

from ldae.evaluation.tables import published
from ldae.evaluation.tables.layout import Cell, Column, Row, Table
from ldae.evaluation.tables.sources import Sources

KEY = re.compile(r"reconstruction/(?P<sampler>\w+)_(?P<steps>\d+)/(?P<source>encoded|semantic)/\w+")
SOURCES = {"encoded": "encoded z_T and y", "semantic": "y alone"}
QUALITIES = {
    "ssim_published": "SSIM, the paper's window",
    "ssim_mask": "SSIM in the brain",
    "lpips": "LPIPS, mean of all slices",
}
PAPERS = "ddim"  # the sampler of the paper
NOTES = (
    "The last column is the autoencoder alone, the best that decoding can be expected to reach. It is measured on all "
    "test scans, the samplers on a few of them.",
    "SSIM with the paper's window is over the whole volume, background included, which raises it; compare methods by "
    "SSIM in the brain. The paper's LPIPS is the sum over three planes of random slices, ours the mean of all slices.",
)


def build_reconstruction(sources: Sources) -> Table:
    """Rows by sampler, source and metric, columns by number of steps."""
    metrics, name = sources.run.metrics, sources.run.name
    found = {(match["sampler"], int(match["steps"])) for key in metrics if (match := KEY.fullmatch(key))}
    steps = sorted({*published.STEPS, *(number for _, number in found)})
    columns = [*(Column(f"{number} steps") for number in steps), Column("autoencoder")]
    command = sources.run.command("reconstruction")
    rows = []
    for sampler in sorted({PAPERS, *(sampler for sampler, _ in found)}, key=lambda each: (each != PAPERS, each)):
        rows += _rows_of_sampler(metrics, name, sampler, steps, command)
    rows += _published(steps)
    absent = [number for number in published.STEPS if (PAPERS, number) not in found]
    notes = [*NOTES, f"{_join(absent)} steps of {PAPERS.upper()} were not measured: {command}"] if absent else NOTES
    return Table("reconstruction", "Reconstruction by number of steps", columns, rows, notes)


def _join(numbers: Sequence[int]) -> str:
    return " and ".join([", ".join(map(str, numbers[:-1])), str(numbers[-1])] if numbers[1:] else map(str, numbers))


def _rows_of_sampler(
    metrics: Mapping[str, float], name: str, sampler: str, steps: Sequence[int], command: str
) -> list[Row]:
    rows = []
    for metric, words in QUALITIES.items():
        for source, of in SOURCES.items():
            cells = [Cell.read(metrics, f"reconstruction/{sampler}_{number}/{source}/{metric}") for number in steps]
            if metric == "lpips" and not any(cells):
                continue  # without weights of a perceptual network it cannot be measured
            missing = not any(cells)
            best = None if missing else Cell.read(metrics, f"reconstruction/autoencoder/{metric}")
            rows.append(Row(f"{words}; {of}; {sampler.upper()}", [*cells, best], name, command))
    return rows


def _published(steps: Sequence[int]) -> list[Row]:
    def cells(values: Mapping[int, float], best: float | None) -> list[Cell | None]:
        by_step = [Cell(values[number]) if number in values else None for number in steps]
        return [*by_step, None if best is None else Cell(best)]

    ssim, lpips = "SSIM; {}; DDIM", "LPIPS, sum of planes; {}; DDIM"
    return [
        published.published_row(
            ssim.format(SOURCES["encoded"]), cells(published.SSIM_ENCODED, published.SSIM_AUTOENCODER)
        ),
        published.published_row(ssim.format(SOURCES["semantic"]), cells(published.SSIM_SEMANTIC, None)),
        published.published_row(
            lpips.format(SOURCES["encoded"]), cells(published.LPIPS_ENCODED, published.LPIPS_AUTOENCODER)
        ),
    ]
