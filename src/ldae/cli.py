"""The console script `ldae`, which applies trained models to scans. Its commands are in ldae/commands/."""

import errno
import logging
import sys

import click

from ldae.commands.cohort import cohort
from ldae.commands.embed import embed
from ldae.commands.export import export
from ldae.commands.forecast import forecast
from ldae.commands.import_official import import_official
from ldae.commands.interpolate import interpolate
from ldae.commands.manipulate import manipulate
from ldae.commands.phantom import phantom
from ldae.commands.preprocess import preprocess
from ldae.commands.reconstruct import reconstruct
from ldae.commands.sample import sample
from ldae.commands.tables import tables
from ldae.commands.vary import vary
from ldae.utils.errors import UserError

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
COMMANDS = (
    preprocess, cohort, embed, reconstruct, vary, interpolate, manipulate, forecast, sample, tables, export, phantom,
    import_official,
)  # fmt: skip


class _Group(click.Group):
    """Ends a user's mistake in one line and exit status 2, and lists commands in the order of their use."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"ldae: {error}", err=True)
        except OSError as error:  # a disk that is full or not writable, a file that was deleted
            if error.errno == errno.EPIPE:  # `ldae ... | head`
                raise
            click.echo(f"ldae: {error.filename or 'cannot write'}: {error.strerror or error}", err=True)
        except Exception as error:  # Hydra wraps what a constructor raises
            if not isinstance(error.__cause__, UserError):
                raise
            click.echo(f"ldae: {error.__cause__}", err=True)
        sys.exit(2)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_Group, context_settings=SETTINGS)
@click.version_option(package_name="ldae")
def main() -> None:
    """Latent Diffusion Autoencoders for 3D brain MRI.

    A scan is a NIfTI; the model is a run (--run NAME) or a bundle (--bundle DIR). See also `ldae COMMAND -h`.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


for command in COMMANDS:
    main.add_command(command)


if __name__ == "__main__":
    main()
