"""`ldae manipulate`: how a scan would look with more or less of a label."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ldae.commands.options import (
    expand_scans,
    folder_path,
    load_model,
    model_options,
    numbers,
    output_option,
    said,
    scans_argument,
    steps_option,
    unlike_options,
)  # fmt: skip

if TYPE_CHECKING:
    from torch import Tensor

    from ldae.pipeline import LDAE
    from ldae.scans.scan import Scan


DIRECTION = "What to change: a probe's name, such as diagnosis or age."
ALPHA = (
    "How far, one image each. 1 is sqrt(768) along the unit direction in standardised y, the length of a typical "
    "standardised y; > 0 towards the disease, or older."
)
DEPTH = "Share of the schedule to invert; less keeps more of the scan. Default: the model's."


@click.command()
@scans_argument("SCAN")
@click.option("--direction", required=True, metavar="NAME", help=DIRECTION)
@click.option("--alpha", default="-1,1", show_default=True, metavar="A,B,...", help=ALPHA)
@output_option("Folder for the images, NAME_diagnosis+1.nii.gz, ..., on the scan's grid.")
@click.option("--decoded", is_flag=True, help="Write what the model decodes, not the scan plus the change.")
@click.option("--viewer", is_flag=True, help="Write NAME_diagnosis.html too: three planes, and a slider over alpha.")
@click.option("--depth", type=click.FloatRange(0, 1, min_open=True), help=DEPTH)
@steps_option
@unlike_options
@model_options
def manipulate(
    scans: tuple[Path, ...], inputs: tuple[Path, ...], direction: str, alpha: str, output: Path, decoded: bool,
    viewer: bool, depth: float | None, steps: int | None, force: bool, preprocess: bool | None, **model: Any,
) -> None:  # fmt: skip
    """Move a scan along a direction and show what changes.

    What is written is the scan plus the change that the model sees, so that detail and skull stay. Printed is the
    probe's verdict on y as it is moved, and on the edited image embedded anew.
    """
    (path,), alphas, output = expand_scans(scans, inputs, 1), numbers(alpha, "--alpha", "-1,1"), folder_path(output)
    ldae = load_model(**model)
    from tqdm import tqdm

    from ldae.scans.scan import write_image

    chosen, scan = ldae.direction(direction), ldae.open(path, not force, preprocess)
    settings = {name: value for name, value in (("depth", depth), ("steps", steps)) if value is not None}
    ladder = ldae.ladder(scan, chosen, [0.0, *alphas], **settings)
    start, *edited = tqdm(ladder, "decoding", len(alphas) + 1)
    for value, volume in zip(alphas, edited, strict=True):
        image = scan.restored(volume) if decoded else scan.edited(volume, start)
        write_image(image, output / f"{scan.name}_{direction}{said(value)}.nii.gz")
    for line in verdicts(ldae, direction, scan, start, dict(zip(alphas, edited, strict=True))):
        click.echo(line)
    if viewer:
        _write_viewer(ldae, scan, direction, {0.0: start, **dict(zip(alphas, edited, strict=True))}, output)
    click.echo(output)


def verdicts(ldae: "LDAE", name: str, scan: "Scan", start: "Tensor", edited: "dict[float, Tensor]") -> "list[str]":
    """A table of what the probe says before and after, tab-separated; one line where there is no such probe."""
    knowledge, y, direction = ldae.readouts, ldae.embed(scan), ldae.direction(name)

    def say(values: "Tensor") -> str:
        return knowledge.predict_label(name, values.cpu().numpy())[0]

    if name not in knowledge.probes:
        return [f"this model has no probe '{name}': no verdict"]
    lines = ["alpha\ty moved\timage embedded anew", f"before\t{say(y)}\t{say(ldae.embed(start))}"]
    lines += [
        f"{said(alpha)}\t{say(direction.edit(y, alpha))}\t{say(ldae.embed(volume))}" for alpha, volume in edited.items()
    ]
    return lines


def _write_viewer(ldae: "LDAE", scan: "Scan", direction: str, volumes: "dict[float, Tensor]", output: Path) -> None:
    from ldae.scans.scan import reorient_to_ras
    from ldae.utils.html_viewer import write_viewer

    axes, spacing = ldae.transform.orientation, ldae.transform.spacing or (1.0, 1.0, 1.0)
    frames = {f"alpha {said(a)}": reorient_to_ras(volumes[a][0, 0].cpu().numpy(), axes) for a in sorted(volumes)}
    write_viewer(output / f"{scan.name}_{direction}.html", f"{scan.name}: {direction}", frames, "alpha +0", spacing)
