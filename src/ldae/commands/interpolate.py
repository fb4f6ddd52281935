"""`ldae interpolate`: scans between two scans."""

from pathlib import Path
from typing import Any

import click

from ldae.commands.options import (
    expand_scans,
    folder_path,
    load_model,
    model_options,
    numbers,
    output_option,
    scans_argument,
    steps_option,
    unlike_options,
)  # fmt: skip
from ldae.utils.errors import UserError


@click.command()
@scans_argument("A B")
@click.option("--at", default="0.25,0.5,0.75", show_default=True, help="Places between A (0) and B (1), with commas.")
@output_option("Folder for the images, A_to_B_at0.5.nii.gz, ..., on the grid of A.")
@click.option("--decoded", is_flag=True, help="Write what the model decodes, not A plus the change from A.")
@steps_option
@unlike_options
@model_options
def interpolate(
    scans: tuple[Path, ...], inputs: tuple[Path, ...], at: str, output: Path, decoded: bool, steps: int | None,
    force: bool, preprocess: bool | None, **model: Any,
) -> None:  # fmt: skip
    """Scans between A and B, such as visits between two visits of one person.

    What is written is A plus the change that the model sees from A, so that A's detail stays; for two people give
    --decoded.
    """
    paths, places, output = expand_scans(scans, inputs, 2), numbers(at, "--at", "0.25,0.5,0.75"), folder_path(output)
    if not all(0 <= place <= 1 for place in places):
        raise UserError(f"--at {at}: places lie between 0, which is A, and 1, which is B")
    ldae = load_model(**model)
    from tqdm import tqdm

    from ldae.scans.scan import write_image

    first, second = (ldae.open(path, not force, preprocess) for path in paths)
    start, *between = (
        volume for volume in tqdm(ldae.between(first, second, [0.0, *places], steps), "decoding", len(places) + 1)
    )
    for place, volume in zip(places, between, strict=True):
        image = first.restored(volume) if decoded else first.edited(volume, start)
        write_image(image, output / f"{first.name}_to_{second.name}_at{place:g}.nii.gz")
    click.echo(output)
