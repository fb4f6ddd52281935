"""`ldae vary`: what y leaves open about a scan."""

from pathlib import Path
from typing import Any

import click

from ldae.commands.options import (
    expand_scans,
    folder_path,
    load_model,
    model_options,
    output_option,
    scans_argument,
    seed_option,
    steps_option,
    unlike_options,
)  # fmt: skip


@click.command()
@scans_argument("SCAN")
@click.option("-n", "--count", type=click.IntRange(1), default=8, show_default=True, help="Number of variants.")
@seed_option
@output_option("Folder for the variants, NAME_vary01.nii.gz, ..., on the scan's grid.")
@steps_option
@unlike_options
@model_options
def vary(
    scans: tuple[Path, ...], inputs: tuple[Path, ...], count: int, seed: int, output: Path, steps: int | None,
    force: bool, preprocess: bool | None, **model: Any,
) -> None:  # fmt: skip
    """Decode one scan's y with different random codes.

    Variants agree in what y holds and differ in the rest. The same seed gives the same variants.
    """
    (path,), output = expand_scans(scans, inputs, 1), folder_path(output)
    ldae = load_model(**model)
    from tqdm import tqdm

    from ldae.scans.scan import write_image

    scan = ldae.open(path, not force, preprocess)
    y, codes = ldae.embed(scan), ldae.noise(count, seed)
    for number in tqdm(range(count), desc="variants"):
        variant = ldae.decode(codes[number : number + 1], y, steps)
        write_image(scan.restored(variant), output / f"{scan.name}_vary{number + 1:02d}.nii.gz")
    click.echo(output)
