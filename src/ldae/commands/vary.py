"""`ldae vary`: variants of a scan that share its y."""

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
    preprocess_options,
    scans_argument,
    seed_option,
    steps_option,
)
from ldae.commands.results import Results


@click.command()
@scans_argument("SCAN", count=1)
@click.option("-n", "--count", type=click.IntRange(1), default=8, show_default=True, help="Number of variants.")
@seed_option
@output_option("Folder for the variants, NAME_vary01.nii.gz, ..., on the scan's grid.")
@steps_option
@preprocess_options
@model_options
def vary(
    paths: list[Path],
    count: int,
    seed: int,
    output: Path,
    steps: int | None,
    force: bool,
    preprocess: bool | None,
    orientation: str | None,
    **model: Unpack[ModelOptions],
) -> None:
    """Decode one scan's y with different random noise.

    Variants share what y contains of the scan and differ in the rest. The same seed gives the same variants.
    """
    check_folder_path(output)
    from ldae.scans.scan import scan_name, write_image

    files = [output / f"{scan_name(paths[0])}_vary{number + 1:02d}.nii.gz" for number in range(count)]
    results = Results.of(paths, files)
    ldae = load_model(**model)
    from tqdm import tqdm

    scan = ldae.open(paths[0], not force, preprocess, orientation)
    y, noise = ldae.embed(scan), ldae.noise(count, seed)
    for number, file in enumerate(tqdm(files, desc="variants")):
        variant = ldae.decode(noise[number : number + 1], y, steps)
        results.write(file, partial(write_image, scan.restored(variant)))
    click.echo(output)
