"""`ldae embed`: y of scans, as a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import click

from ldae.commands.embed_shards import Rejected, ShardedTable, write_rejected
from ldae.commands.options import (
    ModelOptions,
    check_table_path,
    load_model,
    merge_option,
    model_options,
    output_option,
    preprocess_options,
    scans_argument,
    shard_option,
)
from ldae.utils.errors import UserError
from ldae.utils.shards import Shard

if TYPE_CHECKING:
    from ldae.pipeline import LDAE

SOME_REJECTED = 1  # exit status


@click.command()
@scans_argument("SCANS...")
@output_option("The table: path, key, y000, y001, ..., one row per scan.")
@preprocess_options
@shard_option
@merge_option
@model_options
def embed(
    paths: list[Path],
    output: Path,
    force: bool,
    preprocess: bool | None,
    orientation: str | None,
    shard: Shard | None,
    merge: bool,
    **model: Unpack[ModelOptions],
) -> None:
    """Compute y, the semantic vector, of scans.

    Rows of OUTPUT that belong to the same scan and the same model are kept: the same command again continues where it
    stopped. A scan that cannot be used is written with the reason to a second table, OUTPUT's name with `_rejected`,
    and the exit status is then 1. Several jobs can share the work if each is given all scans and its --shard.
    """
    paths = list(dict.fromkeys(paths))
    if shard and merge:
        raise UserError("--shard and --merge exclude each other: give one of them")
    check_table_path(output)
    if merge:
        rejected = ShardedTable(output).merge(paths)
    else:
        if not any(path.exists() for path in paths):
            from ldae.data.nifti import reason_missing

            reason = reason_missing(paths[0])
            raise UserError(f"none of the {len(paths)} scans could be embedded; the first: {paths[0]}: {reason}")
        embedder = _Embedder(load_model(**model), force, preprocess, orientation)
        rejected = _embed_all(embedder, paths, output) if shard is None else _embed_part(embedder, paths, output, shard)
    if rejected is None:
        click.echo(f"ldae: shard {shard} is finished; the last shard, or --merge, writes {output}", err=True)
        return
    write_rejected(output, rejected)
    if len(rejected) == len(paths):
        raise UserError(f"none of the {len(paths)} scans could be embedded; the first: {': '.join(rejected[0])}")
    click.echo(output)
    if rejected:
        click.echo(f"ldae: {len(rejected)} of {len(paths)} scans were rejected", err=True)
        raise SystemExit(SOME_REJECTED)


def _embed_all(embedder: "_Embedder", paths: Sequence[Path], output: Path) -> Rejected:
    """Append y of all scans to the table. Returns the scans that were rejected."""
    from tqdm import tqdm

    from ldae.utils.locks import lock_file
    from ldae.utils.resumable_csv import ResumableCsv

    rejected: Rejected = []
    with (
        lock_file(output, "give several jobs a --shard I/N each"),
        ResumableCsv.open(output, embedder.columns) as table,
    ):
        for path in tqdm(paths, desc="embed", unit="scan"):
            try:
                key = embedder.key(path)
                if not table.has(path, key):
                    table.add(path, key, embedder.embed(path))
            except (UserError, OSError) as error:
                rejected.append((str(path), _reject(path, error)))
    return rejected


def _embed_part(embedder: "_Embedder", paths: Sequence[Path], output: Path, shard: Shard) -> Rejected | None:
    """Compute y of the scans of a shard; the last shard writes the table.

    Returns:
        The scans that were rejected by all shards; None if other shards are not finished.
    """
    from tqdm import tqdm

    table = ShardedTable(output)
    finished = table.open(embedder.columns)
    for path in tqdm(shard.take(paths), desc=f"embed {shard}", unit="scan"):
        try:
            key = embedder.key(path)
            if finished.get(str(path)) != key and not table.has(path, key):
                table.add(path, key, embedder.identity, embedder.embed(path))
        except (UserError, OSError) as error:
            table.reject(path, embedder.identity, _reject(path, error))
    return table.merge(paths) if table.mark_finished(shard, paths, embedder.identity) else None


def _reject(path: Path, error: UserError | OSError) -> str:
    """Show and return the reason why a scan cannot be used."""
    from tqdm import tqdm

    from ldae.data.nifti import reason_missing

    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    if isinstance(error, FileNotFoundError):
        reason = reason_missing(path)
    tqdm.write(f"rejected: {path}: {reason}", file=click.get_text_stream("stderr"))
    return reason


class _Embedder:
    """Computes y of scans with one model and one set of options.

    Attributes:
        columns: names of the numbers.
        identity: everything other than the scan that y depends on; rows with another identity are computed again.
    """

    def __init__(self, ldae: "LDAE", force: bool, preprocess: bool | None, orientation: str | None) -> None:
        self._ldae, self._force, self._preprocess, self._orientation = ldae, force, preprocess, orientation
        self.columns = [f"y{index:03d}" for index in range(ldae.encoder.dim)]
        view = "" if ldae.view is None else ldae.view.key()
        self.identity = f"{ldae.bundle.weights_hash}{ldae.transform.key()}{view}"
        if str(ldae.dtype) != "torch.float32":  # its last digits
            self.identity += str(ldae.dtype)
        if force or preprocess is not None:  # for scans that fail the out-of-distribution check
            self.identity += f"{force}{preprocess}"

    def key(self, path: Path) -> str:
        """A key that changes with the scan and with `identity`."""
        from ldae.utils.resumable_csv import content_key

        return content_key(path, self.identity + _file_identity(path, self._orientation))

    def embed(self, path: Path) -> list[float]:
        """y of a scan."""
        scan = self._ldae.open(path, not self._force, self._preprocess, self._orientation)
        return self._ldae.embed(scan)[0].tolist()


def _file_identity(path: Path, orientation: str | None) -> str:
    """What y depends on beside the content of the file at `path`; empty for nearly all scans."""
    from ldae.data.nifti import find_partner, states_orientation
    from ldae.utils.files import file_sha256

    partner = find_partner(path)
    identity = "" if partner is None else file_sha256(partner)
    return identity + (orientation if orientation and not states_orientation(path) else "")
