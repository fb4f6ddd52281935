"""`ldae sample`: unconditional samples of the diffusion model."""

from pathlib import Path
from typing import Unpack

import click

from ldae.commands.options import (
    ModelOptions,
    check_folder_path,
    load_model,
    model_options,
    output_option,
    seed_option,
    steps_option,
)


@click.command()
@click.option("-n", "--count", type=click.IntRange(1), default=4, show_default=True, help="Number of samples.")
@seed_option
@output_option("Folder for sample01.nii.gz, ..., in model space, where they overlay on the training scans.")
@steps_option
@model_options
def sample(count: int, seed: int, output: Path, steps: int | None, **model: Unpack[ModelOptions]) -> None:
    """Draw unconditional samples from the diffusion model, without any y. Intensities are between 0 and 1."""
    check_folder_path(output)
    ldae = load_model(**model)
    from tqdm import tqdm

    from ldae.scans.scan import nifti_in_model_space, write_image

    noise = ldae.noise(count, seed)
    for number in tqdm(range(count), desc="samples"):
        volume = ldae.sample_from(noise[number : number + 1], steps)[0]
        image = nifti_in_model_space(volume, ldae.transform, ldae.bundle.affine)
        write_image(image, output / f"sample{number + 1:02d}.nii.gz")
    click.echo(output)
