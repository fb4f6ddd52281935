"""`ldae reconstruct`: encode a scan and decode it again."""

from functools import partial
from pathlib import Path
from typing import Unpack

import click

from ldae.commands.options import (
    ModelOptions,
    check_image_path,
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
@output_option("The reconstruction, a NIfTI on the scan's own grid and in its intensity range.")
@click.option("--semantic", is_flag=True, help="Decode from y and random noise: what y contains of the scan.")
@seed_option
@steps_option
@preprocess_options
@model_options
def reconstruct(
    paths: list[Path],
    output: Path,
    semantic: bool,
    seed: int,
    steps: int | None,
    force: bool,
    preprocess: bool | None,
    orientation: str | None,
    **model: Unpack[ModelOptions],
) -> None:
    """Encode a scan and decode it again.

    It is decoded from y and the scan's own stochastic code, which together contain nearly all of the scan; with
    --semantic from y and random noise.
    """
    check_image_path(output, paths[0])
    results = Results.of(paths, [output])
    ldae = load_model(**model)
    from ldae.scans.scan import write_image

    scan = ldae.open(paths[0], not force, preprocess, orientation)
    volume = ldae.vary(scan, 1, seed, steps) if semantic else ldae.reconstruct(scan, steps)
    results.write(output, partial(write_image, scan.restored(volume)))
    click.echo(output)
