"""`ldae import-official`: the released checkpoints as a bundle."""

from pathlib import Path

import click

from ldae.commands.options import PATH, output_option


@click.command("import-official")
@click.option("--autoencoder", required=True, type=PATH, help="Path of autoencoderkl.pth.")
@click.option("--encoder", required=True, type=PATH, help="Path of encoder.pth.")
@click.option("--decoder", required=True, type=PATH, help="Path of decoder.pth.")
@click.option("--unet", type=PATH, help="Training checkpoint that contains the U-Net under `ema_unet.`.")
@click.option("--probe", type=PATH, help="The linear AD/CN probe.")
@click.option("--mean", type=PATH, help="Mean of y that the probe was fitted with.")
@click.option("--std", type=PATH, help="Standard deviation of y that the probe was fitted with.")
@output_option("Folder of the bundle.")
def import_official(output: Path, **paths: Path | None) -> None:
    """Convert the released LDAE checkpoints to a bundle, a folder that --bundle and LDAE.load open."""
    from ldae.bundle.import_official import import_official as convert

    convert(**paths, out=output)
    click.echo(output)
