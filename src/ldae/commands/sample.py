"""`ldae sample`: scans of nobody."""

from pathlib import Path
from typing import Any

import click

from ldae.commands.options import folder_path, load_model, model_options, output_option, seed_option, steps_option


@click.command()
@click.option("-n", "--count", type=click.IntRange(1), default=4, show_default=True, help="Number of scans.")
@seed_option
@output_option("Folder for the scans, sample01.nii.gz, ..., in model space, where they overlay on the training scans.")
@steps_option
@model_options
def sample(count: int, seed: int, output: Path, steps: int | None, **model: Any) -> None:
    """Draw scans from the diffusion model alone, without any y. Intensities lie between 0 and 1."""
    output = folder_path(output)
    ldae = load_model(**model)
    from tqdm import tqdm

    from ldae.scans.scan import nifti_in_model_space, write_image

    codes = ldae.noise(count, seed)
    for number in tqdm(range(count), desc="samples"):
        volume = ldae.sample_from(codes[number : number + 1], steps)[0]
        write_image(
            nifti_in_model_space(volume, ldae.transform, ldae.bundle.affine), output / f"sample{number + 1:02d}.nii.gz"
        )
    click.echo(output)
