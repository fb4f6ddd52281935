"""`ldae interpolate`: scans between two scans."""

from functools import partial
from pathlib import Path
from typing import Unpack

import click

from ldae.commands.options import (
    ModelOptions,
    check_folder_path,
    load_model,
    model_options,
    output_option,
    parse_numbers,
    preprocess_options,
    scans_argument,
    steps_option,
)
from ldae.commands.results import Results
from ldae.utils.errors import UserError


@click.command()
@scans_argument("A B", count=2)
@click.option("--at", default="0.25,0.5,0.75", show_default=True, help="Positions from A (0) to B (1), with commas.")
@output_option("Folder for the images, A_to_B_at0.5.nii.gz, ..., on the grid of A.")
@click.option("--decoded", is_flag=True, help="Write the decoded volumes instead of A plus the change from A.")
@steps_option
@preprocess_options
@model_options
def interpolate(
    paths: list[Path],
    at: str,
    output: Path,
    decoded: bool,
    steps: int | None,
    force: bool,
    preprocess: bool | None,
    orientation: str | None,
    **model: Unpack[ModelOptions],
) -> None:
    """Interpolate between scans A and B, such as two visits of one person.

    An image is A plus the change that the model predicts from A, so that A's detail is kept. For scans of two people
    use --decoded.
    """
    positions = parse_numbers(at, "--at", "0.25,0.5,0.75")
    if not all(0 <= position <= 1 for position in positions):
        raise UserError(f"--at {at}: positions must be between 0, which is A, and 1, which is B")
    check_folder_path(output)
    from ldae.scans.scan import scan_name, write_image

    names = "_to_".join(map(scan_name, paths))
    files = [output / f"{names}_at{position:g}.nii.gz" for position in positions]
    results = Results.of(paths, files)
    ldae = load_model(**model)
    from tqdm import tqdm

    first, second = (ldae.open(path, not force, preprocess, orientation) for path in paths)
    volumes = ldae.interpolate_each(first, second, [0.0, *positions], steps)
    start, *between = tqdm(volumes, "decoding", len(positions) + 1)
    for file, volume in zip(files, between, strict=True):
        image = first.restored(volume) if decoded else first.edited(volume, start)
        results.write(file, partial(write_image, image))
    click.echo(output)
