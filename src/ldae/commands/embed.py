"""`ldae embed`: y of scans, as a table that grows."""

from pathlib import Path
from typing import Any

import click

from ldae.commands.options import (
    expand_scans,
    load_model,
    model_options,
    output_option,
    scans_argument,
    table_path,
    unlike_options,
)
from ldae.utils.errors import UserError

SOME_FAILED = 1  # exit status where some scans were set aside


@click.command()
@scans_argument("SCANS...")
@output_option("The table: path, key, y000, y001, ..., a row a scan.")
@unlike_options
@model_options
def embed(
    scans: tuple[Path, ...], inputs: tuple[Path, ...], output: Path, force: bool, preprocess: bool | None, **model: Any
) -> None:
    """Compute y, the semantic vector, of scans.

    Rows that OUTPUT has already, of the same scan and the same model, are kept: the same command again goes on where it
    stopped. A scan that cannot be used is set aside with the reason, in OUTPUT's name with `_rejected`, and the rest
    goes on; the exit status is then 1.
    """
    paths = list(dict.fromkeys(expand_scans(scans, inputs)))
    output = table_path(output)
    ldae = load_model(**model)
    from tqdm import tqdm

    from ldae.utils.resumable_csv import ResumableCsv, content_key

    identity = f"{ldae.bundle.weights_hash}{ldae.transform.key()}"
    if str(ldae.dtype) != "torch.float32":  # whose last digits are others
        identity += str(ldae.dtype)
    if force or preprocess is not None:  # another y, where the scan is unlike the training scans
        identity += f"{force}{preprocess}"
    columns = [f"y{index:03d}" for index in range(ldae.encoder.dim)]
    rejected: list[tuple[str, str]] = []
    with ResumableCsv.open(output, columns) as table:
        for path in tqdm(paths, desc="embed", unit="scan"):
            try:
                key = content_key(path, identity)
                if table.has(path, key):
                    continue
                table.add(path, key, ldae.embed(ldae.open(path, not force, preprocess))[0].tolist())
            except (UserError, OSError) as error:
                reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
                rejected.append((str(path), reason))
                tqdm.write(f"set aside: {path}: {reason}", file=click.get_text_stream("stderr"))
    _write_rejected(output, rejected)
    if len(rejected) == len(paths):
        raise UserError(f"none of the {len(paths)} scans could be embedded; the first: {': '.join(rejected[0])}")
    click.echo(output)
    if rejected:
        click.echo(f"ldae: {len(rejected)} of {len(paths)} scans were set aside", err=True)
        raise SystemExit(SOME_FAILED)


def _write_rejected(output: Path, rejected: list[tuple[str, str]]) -> None:
    """Beside `output`; an old one is removed where nothing was set aside."""
    import csv

    from ldae.utils.files import replacing

    path = output.with_name(f"{output.stem}_rejected.csv")
    if not rejected:
        path.unlink(missing_ok=True)
        return
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([("path", "reason"), *rejected])
