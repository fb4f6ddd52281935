"""`ldae reconstruct`: a scan as the model sees it."""

from pathlib import Path
from typing import Any

import click

from ldae.commands.options import (
    expand_scans,
    image_path,
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
@output_option("The reconstruction, a NIfTI on the scan's own grid and in its range of intensities.")
@click.option("--semantic", is_flag=True, help="Decode from y alone: what the 768 numbers hold of the scan.")
@seed_option
@steps_option
@unlike_options
@model_options
def reconstruct(
    scans: tuple[Path, ...], inputs: tuple[Path, ...], output: Path, semantic: bool, seed: int, steps: int | None,
    force: bool, preprocess: bool | None, **model: Any,
) -> None:  # fmt: skip
    """Encode a scan and decode it again.

    From its y and its own stochastic code, which hold nearly all of it, or with --semantic from its y and random noise.
    """
    (path,) = expand_scans(scans, inputs, 1)
    output = image_path(output, path)
    ldae = load_model(**model)
    from ldae.scans.scan import write_image

    scan = ldae.open(path, not force, preprocess)
    volume = ldae.vary(scan, 1, seed, steps) if semantic else ldae.reconstruct(scan, steps)
    write_image(scan.restored(volume), output)
    click.echo(output)
