"""`ldae embed`: y of scans, as a table."""

from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from ldae.commands.options import (
    ModelOptions,
    check_table_path,
    load_model,
    model_options,
    output_option,
    preprocess_options,
    scans_argument,
)
from ldae.utils.errors import UserError

if TYPE_CHECKING:
    from ldae.pipeline import LDAE

SOME_REJECTED = 1  # exit status


@click.command()
@scans_argument("SCANS...")
@output_option("The table: path, key, y000, y001, ..., one row per scan.")
@preprocess_options
@model_options
def embed(
    paths: list[Path],
    output: Path,
    force: bool,
    preprocess: bool | None,
    orientation: str | None,
    **model: Unpack[ModelOptions],
) -> None:
    """Compute y, the semantic vector, of scans.

    Rows of OUTPUT that belong to the same scan and the same model are kept: the same command again continues where it
    stopped. A scan that cannot be used is written with the reason to a second table, OUTPUT's name with `_rejected`,
    and the exit status is then 1.
    """
    paths = list(dict.fromkeys(paths))
    check_table_path(output)
    if not any(path.exists() for path in paths):
        raise UserError(f"none of the {len(paths)} scans could be embedded; the first: {paths[0]}: no such file")
    ldae = load_model(**model)
    from tqdm import tqdm

    from ldae.utils.resumable_csv import ResumableCsv, content_key

    identity = _model_identity(ldae, force, preprocess)
    columns = [f"y{index:03d}" for index in range(ldae.encoder.dim)]
    rejected: list[tuple[str, str]] = []
    with ResumableCsv.open(output, columns) as table:
        for path in tqdm(paths, desc="embed", unit="scan"):
            try:
                key = content_key(path, identity + _file_identity(path, orientation))
                if table.has(path, key):
                    continue
                table.add(path, key, ldae.embed(ldae.open(path, not force, preprocess, orientation))[0].tolist())
            except (UserError, OSError) as error:
                reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
                rejected.append((str(path), reason))
                tqdm.write(f"rejected: {path}: {reason}", file=click.get_text_stream("stderr"))
    _write_rejected(output, rejected)
    if len(rejected) == len(paths):
        raise UserError(f"none of the {len(paths)} scans could be embedded; the first: {': '.join(rejected[0])}")
    click.echo(output)
    if rejected:
        click.echo(f"ldae: {len(rejected)} of {len(paths)} scans were rejected", err=True)
        raise SystemExit(SOME_REJECTED)


def _model_identity(ldae: "LDAE", force: bool, preprocess: bool | None) -> str:
    """Everything other than the scan that y depends on; rows with another identity are computed again."""
    identity = f"{ldae.bundle.weights_hash}{ldae.transform.key()}"
    if str(ldae.dtype) != "torch.float32":  # its last digits
        identity += str(ldae.dtype)
    if force or preprocess is not None:  # for scans that fail the out-of-distribution check
        identity += f"{force}{preprocess}"
    return identity


def _file_identity(path: Path, orientation: str | None) -> str:
    """What y depends on beside the content of the file at `path`; empty for nearly all scans."""
    from ldae.data.nifti import find_partner, states_orientation
    from ldae.utils.files import file_sha256

    partner = find_partner(path)
    identity = "" if partner is None else file_sha256(partner)
    return identity + (orientation if orientation and not states_orientation(path) else "")


def _write_rejected(output: Path, rejected: list[tuple[str, str]]) -> None:
    """Write the table of rejected scans beside `output`, or remove an earlier one if no scan was rejected."""
    import csv

    from ldae.utils.files import replacing

    path = output.with_name(f"{output.stem}_rejected.csv")
    if not rejected:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([("path", "reason"), *rejected])
