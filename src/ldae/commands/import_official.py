"""`ldae import-official`: the released checkpoints as a bundle."""

from pathlib import Path

import click

from ldae.commands.options import PATH, output_option


@click.command("import-official")
@click.option("--autoencoder", required=True, type=PATH, help="autoencoderkl.pth")
@click.option("--encoder", required=True, type=PATH, help="encoder.pth")
@click.option("--decoder", required=True, type=PATH, help="decoder.pth")
@click.option("--unet", type=PATH, help="Training checkpoint with the U-Net under `ema_unet.`.")
@click.option("--probe", type=PATH, help="The linear AD/CN probe.")
@click.option("--mean", type=PATH, help="Mean of y that the probe was fitted with.")
@click.option("--std", type=PATH, help="Standard deviation of y likewise.")
@output_option("The bundle's folder.")
def import_official(**paths: Path | None) -> None:
    """Turn the released LDAE checkpoints into a bundle that LDAE.load opens."""
    from ldae.bundle.import_official import import_official as convert

    out = paths.pop("output")
    convert(**paths, out=out)
    click.echo(out)
