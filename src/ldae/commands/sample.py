"""`ldae sample`: a synthetic cohort, scans of people who do not exist with their table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

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
from ldae.utils.errors import UserError

if TYPE_CHECKING:
    from ldae.pipeline import LDAE

RECORD = "sample.json"  # what the images of a folder were drawn from
TABLE = "scans.csv"


@click.command()
@click.option("-n", "--count", type=click.IntRange(1), default=4, show_default=True, help="Number of samples.")
@seed_option
@click.option(
    "--where",
    multiple=True,
    metavar="COLUMN=VALUE",
    help="A condition on a column of the prior, such as diagnosis=AD or age=75. Can be repeated; others are drawn.",
)
@click.option("--without-prior", is_flag=True, help="Sample from the U-Net alone, without any y and without labels.")
@output_option(f"Folder for sample01.nii.gz, ... in model space, and {TABLE}, their table for data=table.")
@steps_option
@model_options
def sample(
    count: int,
    seed: int,
    where: tuple[str, ...],
    without_prior: bool,
    output: Path,
    steps: int | None,
    **model: Unpack[ModelOptions],
) -> None:
    """Make a synthetic cohort: y and labels are drawn from the model's prior, then a scan is decoded from each y.

    Sample number i depends on --seed, --where and i alone. The same command continues where it was stopped, and a
    larger -n adds to the samples. Intensities are between 0 and 1.
    """
    check_folder_path(output)
    conditions = _parse_where(where)
    if conditions and without_prior:
        raise UserError("--where needs the prior: leave out --without-prior")
    ldae = load_model(**model)
    if not without_prior:
        _check_prior(ldae, conditions)
    _check_record(output, _describe(ldae, seed, conditions, without_prior, steps))
    _write_samples(ldae, output, count, seed, None if without_prior else conditions, steps)
    click.echo(output)


def _parse_where(where: Sequence[str]) -> dict[str, str]:
    """--where COLUMN=VALUE ... as values by column."""
    conditions: dict[str, str] = {}
    for text in where:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise UserError(f"--where {text}: give COLUMN=VALUE, as in --where diagnosis=AD")
        if name in conditions:
            raise UserError(f"--where {text}: {name} is given twice")
        conditions[name] = value
    return conditions


def _check_prior(ldae: "LDAE", conditions: dict[str, str]) -> None:
    """Refuse a model without a prior, and conditions that it does not know."""
    from ldae.prior.columns import parse_conditions

    try:
        prior = ldae.semantic_prior
    except UserError as error:
        remedy = "" if conditions else "; or sample from the U-Net alone with --without-prior"
        raise UserError(f"{error}{remedy}") from error
    parse_conditions(prior.columns, prior.labels.ends, conditions)


def _describe(
    ldae: "LDAE", seed: int, conditions: dict[str, str], without_prior: bool, steps: int | None
) -> dict[str, Any]:
    """Everything that sample number i depends on, apart from i."""
    return {
        "weights": {name: network.sha256 for name, network in sorted(ldae.bundle.networks.items())},
        "sampler": repr(ldae.sampler if steps is None else ldae.sampler.with_steps(steps)),
        "seed": seed,
        "where": conditions,
        "prior": not without_prior,
        "precision": str(ldae.dtype),
    }


def _check_record(output: Path, description: dict[str, Any]) -> None:
    """Store what the samples in a folder are drawn from; refuse a folder with samples of something else."""
    from ldae.utils.files import read_json, write_json

    path = output / RECORD
    if path.is_file():
        try:
            stored = read_json(path)
        except ValueError:
            stored = {}
        changed = [key for key in description if not isinstance(stored, dict) or stored.get(key) != description[key]]
        if changed:
            raise UserError(f"{output} has samples of another {' and '.join(changed)}: choose another -o")
    else:
        write_json(path, description)


def _write_samples(
    ldae: "LDAE", output: Path, count: int, seed: int, conditions: dict[str, str] | None, steps: int | None
) -> None:
    """Draw and write the samples that are missing, then the table of all of them.

    Args:
        conditions: see LDAE.sample; None: without the prior.
    """
    import pandas as pd
    from tqdm import tqdm

    from ldae.data.table import write_table
    from ldae.prior.draws import draw_semantics
    from ldae.scans.scan import nifti_in_model_space, write_image

    rows, tables = [], []
    for number in tqdm(range(count), desc="samples"):
        path = output / f"sample{number + 1:02d}.nii.gz"
        semantics = None if conditions is None else draw_semantics(ldae.semantic_prior, [number], seed, conditions)
        tables += [] if semantics is None else [semantics.table]
        rows.append({"subject": f"sample{number + 1:02d}", "session": "ses-M000", "path": str(path.absolute())})
        if path.is_file():
            continue
        noise = ldae.noise_of([number], seed)
        volume = ldae.sample_from(noise, steps) if semantics is None else ldae.decode(noise, semantics.y, steps)
        write_image(nifti_in_model_space(volume[0], ldae.transform, ldae.bundle.affine), path)
    labels = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(index=range(count))
    required = pd.DataFrame({name: [""] * count for name in ("diagnosis", "age") if name not in labels})
    write_table(pd.concat([pd.DataFrame(rows), required, labels], axis=1), output / TABLE)
