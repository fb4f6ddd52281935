"""`ldae manipulate`: edit a scan along the direction of a label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from ldae.editing.units import unit_of, with_unit
from ldae.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ldae.editing.direction import Direction
    from ldae.pipeline import LDAE


DIRECTION = "The label to change: the name of a direction or probe, such as diagnosis or age."
ALPHA = (
    "Sizes of the edit, one image each. 1 is the mean distance between the two classes along the direction in the "
    "training scans, or one standard deviation of a number; with directions of earlier versions, and with a probe "
    "alone, it is the published step of sqrt(768). Positive is towards the disease, or older. Default: -1,1."
)
BY = (
    "In place of --alpha, changes of a number in its own unit: --direction age --by 10 is ten years older. It is "
    "calibrated by the probe's read-out (corrected for regression to the mean): y moves so far along the direction "
    "that the probe, fitted on the training scans, reads ten years more. It is not a forecast for this person."
)
DEPTH = "Share of the noise schedule to invert; less keeps more of the scan. Default: the model's."
DEFAULT_ALPHA = "-1,1"


@dataclass(frozen=True)
class Edit:
    """One edit of the scan.

    Attributes:
        alpha: its size.
        label: size in words: "+1", "+10 years".
        by: the change of the label in its own unit, if that was asked for.
    """

    alpha: float
    label: str
    by: float | None = None


@click.command()
@scans_argument("SCAN", count=1)
@click.option("--direction", required=True, metavar="NAME", help=DIRECTION)
@click.option("--alpha", metavar="A,B,...", help=ALPHA)
@click.option("--by", metavar="N,M,...", help=BY)
@output_option("Folder for the images, NAME_diagnosis+1.nii.gz or NAME_age_by+10.nii.gz, ..., on the scan's grid.")
@click.option("--decoded", is_flag=True, help="Write the decoded volumes instead of the scan plus the change.")
@click.option("--viewer", is_flag=True, help="Also write NAME_diagnosis.html: three planes with a slider over alpha.")
@click.option("--depth", type=click.FloatRange(0, 1, min_open=True), help=DEPTH)
@steps_option
@preprocess_options
@model_options
def manipulate(
    paths: list[Path],
    direction: str,
    alpha: str | None,
    by: str | None,
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
    sizes = parse_sizes(alpha, by)
    check_folder_path(output)
    from ldae.scans.scan import scan_name, write_image

    stem = f"{scan_name(paths[0])}_{direction}" + ("" if by is None else "_by")
    files, page = [output / f"{stem}{format_signed(size)}.nii.gz" for size in sizes], output / f"{stem}.html"
    results = Results.of(paths, [*files, page] if viewer else files)
    ldae = load_model(**model)
    from tqdm import tqdm

    from ldae.utils.html_viewer import write_viewer

    along = ldae.direction(direction)
    edits = list_edits(along, sizes, counted=by is not None)
    scan = ldae.open(paths[0], not force, preprocess, orientation)
    y = ldae.embed(scan)
    volumes = ldae.manipulate_each(scan, along, [0.0, *(edit.alpha for edit in edits)], y=y, depth=depth, steps=steps)
    start, *edited = tqdm(volumes, "decoding", len(edits) + 1)
    for edit, file, volume in zip(edits, files, edited, strict=True):
        image = scan.restored(volume) if decoded else scan.edited(volume, start)
        results.write(file, partial(write_image, image), describe_edit(direction, along, edit))
    for line in prediction_table(ldae, direction, y, start, list(zip(edits, edited, strict=True))):
        click.echo(line)
    if viewer:
        (unedited,) = list_edits(along, [0.0], counted=by is not None)
        frames = _viewer_frames(ldae, {unedited: start, **dict(zip(edits, edited, strict=True))})
        spacing, title = ldae.transform.spacing or (1.0, 1.0, 1.0), f"{scan.name}: {direction}"
        draw = partial(write_viewer, title=title, frames=frames, reference=_frame_label(unedited), spacing=spacing)
        results.write(page, draw, {"Direction": direction, "AlphaUnit": along.alpha_scale.meaning})
    click.echo(output)


def parse_sizes(alpha: str | None, by: str | None) -> list[float]:
    """The sizes that --alpha or --by lists; those of `DEFAULT_ALPHA` without either.

    Raises:
        UserError: both are given, or no numbers.
    """
    if alpha is not None and by is not None:
        raise UserError("--alpha and --by are both sizes of the edit: give one of them")
    if by is not None:
        return parse_numbers(by, "--by", "-10,10")
    return parse_numbers(DEFAULT_ALPHA if alpha is None else alpha, "--alpha", DEFAULT_ALPHA)


def list_edits(along: "Direction", sizes: Sequence[float], counted: bool) -> list[Edit]:
    """The edits of these sizes, in alpha or, if `counted`, in the own unit of the direction's label.

    Raises:
        UserError: the direction cannot be counted in a unit.
    """
    if not counted:
        return [Edit(size, format_signed(size)) for size in sizes]
    alphas = [along.alpha_for(size) for size in sizes]
    labels = [with_unit(format_signed(size), along.calibration.column) for size in sizes]
    return [Edit(alpha, label, by) for alpha, label, by in zip(alphas, labels, sizes, strict=True)]


def describe_edit(name: str, along: "Direction", edit: Edit) -> dict[str, str | float | None]:
    """How an edited image was made, for the JSON file beside it."""
    made: dict[str, str | float | None] = {
        "Direction": name, "Alpha": edit.alpha, "AlphaUnit": along.alpha_scale.meaning
    }  # fmt: skip
    if edit.by is not None:
        made |= {"By": edit.by, "ByUnit": unit_of(along.calibration.column)}
    return made


def prediction_table(
    ldae: "LDAE", name: str, y: "Tensor", start: "Tensor", edited: "Sequence[tuple[Edit, Tensor]]"
) -> list[str]:
    """The unit of alpha, and the predictions of probe `name` before and after each edit in tab-separated columns.

    Args:
        y: (1, dim), of the scan.
        start: volume decoded without an edit.
        edited: edits and their volumes.
    """
    direction, readouts = ldae.direction(name), ldae.readouts
    lines = [f"alpha = 1: {direction.alpha_scale.meaning}"]
    if name not in ldae.probes:
        return [*lines, f"this model has no probe '{name}': no prediction"]
    own, decoded = y.cpu().numpy(), ldae.embed(start).cpu().numpy()
    before = (readouts.predict_label(name, own)[0], readouts.predict_label(name, decoded)[0])
    size = "by" if edited and edited[0][0].by is not None else "alpha"
    lines += ["\t".join((size, "y moved", "image embedded anew")), "\t".join(("before", *before))]
    for edit, volume in edited:
        moved, embedded = direction.edit(own, edit.alpha), ldae.embed(volume).cpu().numpy()
        changes = (readouts.describe_change(name, *pair)[0] for pair in ((own, moved), (decoded, embedded)))
        lines.append("\t".join((edit.label, *changes)))
    return lines


def _frame_label(edit: Edit) -> str:
    return f"alpha {edit.label}" if edit.by is None else edit.label


def _viewer_frames(ldae: "LDAE", volumes: "Mapping[Edit, Tensor]") -> "dict[str, np.ndarray]":
    """Arrays (X, Y, Z) in RAS by their label, in the order of alpha."""
    from ldae.scans.scan import reorient_to_ras

    return {
        _frame_label(edit): reorient_to_ras(volumes[edit][0, 0].cpu().numpy(), ldae.transform.orientation)
        for edit in sorted(volumes, key=lambda edit: edit.alpha)
    }
