"""`ldae preprocess`: preprocess raw scans for training."""

import signal
import sys
from pathlib import Path
from typing import Any

import click

from ldae.commands.launch import launch_preprocessing
from ldae.commands.options import merge_option, orientation_option, shard_option
from ldae.commands.preprocess_folder import preprocess_folder
from ldae.utils.errors import UserError


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--bias", help="Bias field correction: n4, none.")
@click.option("--brain", help="Brain extraction: deepbet, stripped (already done), none.")
@click.option("--registration", help="Registration to the template: rigid, affine, syn, none (already done).")
@click.option("--intensity", help="Intensity normalisation: none, white_matter, tissues.")
@click.option("--regions", help="Volumes measured in label maps: dlmuse, labels.")
@click.option("--spacing", help="Voxel size of the result in mm, null for the template's own; default: 1.5.")
@click.option(
    "--run",
    type=click.Choice(["first", "last", "best"]),
    default="first",
    show_default=True,
    help="Which T1w scan of a session is used if it has several.",
)
@click.option("--labels", type=click.Path(path_type=Path), help="Folder of label maps *_dseg.nii.gz in native space.")
@click.option(
    "--participants",
    type=click.Path(path_type=Path),
    help="participants.tsv; default: the one in SOURCE. For a CAPS tree or a CSV, give that of the BIDS dataset.",
)
@orientation_option
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set any value of conf/preprocess, or with --launcher any value of a job, such as launcher.partition=cpu.",
)
@click.option(
    "-j", "--workers", default=None, type=click.IntRange(1), help="Number of processes; default: one for each core."
)
@click.option(
    "--threads", default=1, show_default=True, type=click.IntRange(1), help="Number of threads in each process."
)
@shard_option
@merge_option
@click.option(
    "--launcher",
    type=click.Choice(["slurm", "local"]),
    help="Divide the scans among jobs and submit these: to Slurm, or as processes on this machine to try it.",
)
@click.option("--shards", type=click.IntRange(1), help="Number of jobs of --launcher; default: one per 100 scans.")
@click.option(
    "--wait/--no-wait",
    default=True,
    help="With --launcher slurm: wait until all jobs have ended, or return at once. Default: wait.",
)
def preprocess(source: Path, output: Path, overrides: tuple[str, ...], **options: Any) -> None:
    """Preprocess raw T1w scans for training, and write a table and a page for quality control.

    SOURCE is a BIDS dataset, a Clinica CAPS tree, or a CSV with a column `path`. OUTPUT becomes a folder of BIDS
    derivatives with scans.csv, rejected.csv (rejected scans with the reason) and qc.html. The same command continues
    where an earlier one stopped. Several jobs can share a large cohort: see --shard and --launcher.
    """
    launcher, shards, wait = options["launcher"], options["shards"], options["wait"]
    if sum(bool(options[name]) for name in ("shard", "merge", "launcher")) > 1:
        raise UserError("--shard, --merge and --launcher exclude each other: give one of them")
    settings = [text for text in overrides if text.startswith("launcher.")]
    if (shards or settings) and not launcher:
        raise UserError(
            f"{'--shards' if shards else settings[0]} is of no use without --launcher: add --launcher slurm"
        )
    groups = ("bias", "brain", "registration", "intensity", "regions")
    chosen = [f"preprocess/{name}={options[name]}" for name in groups if options[name]]
    chosen += [f"preprocess.spacing={options['spacing']}"] if options["spacing"] else []
    chosen += [f"preprocess.assume_orientation={options['orientation']}"] if options["orientation"] else []
    chosen += [text for text in overrides if text not in settings]
    others = {name: options[name] for name in ("labels", "participants", "workers", "threads", "run")}
    # Schedulers interrupt by SIGTERM: exit through an exception, so that the tables of the finished scans are written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if launcher:
        launch_preprocessing(source, output, (tuple(chosen), others), launcher, shards, settings, wait)
    else:
        preprocess_folder(source, output, chosen, **others, shard=options["shard"], merge=options["merge"])
    if (output / "scans.csv").exists():
        click.echo(output / "scans.csv")
