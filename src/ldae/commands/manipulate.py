"""`ldae manipulate`: edit a scan along the direction of a label."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from ldae.commands.options import (
    ModelOptions,
    check_folder_path,
    format_signed,
    load_model,
    model_options,
    output_option,
    parse_numbers,
    preprocess_options,
    scans_argument,
    steps_option,
)
from ldae.commands.results import Results

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ldae.pipeline import LDAE


DIRECTION = "The label to change: the name of a direction or probe, such as diagnosis or age."
ALPHA = (
    "Sizes of the edit, one image each. 1 is a step of sqrt(768) along the unit direction in standardised y, the "
    "length of a typical y; positive is towards the disease, or older."
)
DEPTH = "Share of the noise schedule to invert; less keeps more of the scan. Default: the model's."


@click.command()
@scans_argument("SCAN", count=1)
@click.option("--direction", required=True, metavar="NAME", help=DIRECTION)
@click.option("--alpha", default="-1,1", show_default=True, metavar="A,B,...", help=ALPHA)
@output_option("Folder for the images, NAME_diagnosis+1.nii.gz, ..., on the scan's grid.")
@click.option("--decoded", is_flag=True, help="Write the decoded volumes instead of the scan plus the change.")
@click.option("--viewer", is_flag=True, help="Also write NAME_diagnosis.html: three planes with a slider over alpha.")
@click.option("--depth", type=click.FloatRange(0, 1, min_open=True), help=DEPTH)
@steps_option
@preprocess_options
@model_options
def manipulate(
    paths: list[Path],
    direction: str,
    alpha: str,
    output: Path,
    decoded: bool,
    viewer: bool,
    depth: float | None,
    steps: int | None,
    force: bool,
    preprocess: bool | None,
    orientation: str | None,
    **model: Unpack[ModelOptions],
) -> None:
    """Edit a scan along the direction of a label.

    An image is the scan plus the change that the model predicts, so that detail and skull are kept. A table on standard
    output gives the probe's prediction for y as it was moved, and for the edited image after embedding it again.
    """
    alphas = parse_numbers(alpha, "--alpha", "-1,1")
    check_folder_path(output)
    from ldae.scans.scan import scan_name, write_image

    name = f"{scan_name(paths[0])}_{direction}"
    files, page = [output / f"{name}{format_signed(value)}.nii.gz" for value in alphas], output / f"{name}.html"
    results = Results.of(paths, [*files, page] if viewer else files)
    ldae = load_model(**model)
    from tqdm import tqdm

    from ldae.utils.html_viewer import write_viewer

    along, scan = ldae.direction(direction), ldae.open(paths[0], not force, preprocess, orientation)
    y = ldae.embed(scan)
    volumes = ldae.manipulate_each(scan, along, [0.0, *alphas], y=y, depth=depth, steps=steps)
    start, *edited = tqdm(volumes, "decoding", len(alphas) + 1)
    by_alpha = dict(zip(alphas, edited, strict=True))
    for file, volume in zip(files, edited, strict=True):
        image = scan.restored(volume) if decoded else scan.edited(volume, start)
        results.write(file, partial(write_image, image))
    for line in prediction_table(ldae, direction, y, start, by_alpha):
        click.echo(line)
    if viewer:
        frames = _viewer_frames(ldae, {0.0: start, **by_alpha})
        spacing = ldae.transform.spacing or (1.0, 1.0, 1.0)
        results.write(page, lambda path: write_viewer(path, f"{scan.name}: {direction}", frames, "alpha +0", spacing))
    click.echo(output)


def prediction_table(
    ldae: "LDAE", name: str, y: "Tensor", start: "Tensor", edited: "Mapping[float, Tensor]"
) -> list[str]:
    """The predictions of probe `name` before and after an edit, as lines of tab-separated columns.

    Args:
        y: (1, dim), of the scan.
        start: volume decoded at alpha = 0.
        edited: volumes by alpha.
    """
    if name not in ldae.probes:
        return [f"this model has no probe '{name}': no prediction"]
    direction = ldae.direction(name)

    def predict(y: "Tensor") -> str:
        return ldae.readouts.predict_label(name, y.cpu().numpy())[0]

    lines = ["alpha\ty moved\timage embedded anew", f"before\t{predict(y)}\t{predict(ldae.embed(start))}"]
    for alpha, volume in edited.items():
        moved, embedded = predict(direction.edit(y, alpha)), predict(ldae.embed(volume))
        lines.append(f"{format_signed(alpha)}\t{moved}\t{embedded}")
    return lines


def _viewer_frames(ldae: "LDAE", volumes: "Mapping[float, Tensor]") -> "dict[str, np.ndarray]":
    """Arrays (X, Y, Z) in RAS by their label."""
    from ldae.scans.scan import reorient_to_ras

    return {
        f"alpha {format_signed(alpha)}": reorient_to_ras(volumes[alpha][0, 0].cpu().numpy(), ldae.transform.orientation)
        for alpha in sorted(volumes)
    }
