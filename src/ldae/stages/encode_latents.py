"""Between stages 1 and 2: compress every scan of a cohort with the trained autoencoder.

Writes one file of all latents, a table and latents.json. Several processes share the work without communicating: the
files on disk show what is done (ldae.data.latent_shards).
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ldae.data.cohort import Cohort
from ldae.data.latent_file import LATENT_FILE, LatentFile, Posterior
from ldae.data.latent_shards import EncodedLatents
from ldae.data.latents import METADATA_FILE, REJECTED_FILE, channel_scale, latent_table_name, write_metadata
from ldae.data.sharing import work_order
from ldae.data.table import scan_names, write_table
from ldae.data.transforms import Transform
from ldae.models.placement import computes_channels_last, place_module, to_memory_format
from ldae.runs import Run
from ldae.scans.ood_check import MAX_SCANS, OodCheck, describe_rejected, find_rejected
from ldae.scans.raw_scan import read_recorded_parameters
from ldae.training.precision import DTYPES
from ldae.utils.errors import UserError
from ldae.utils.files import read_json
from ldae.utils.locks import LOCK, wait_for_lock
from ldae.utils.shards import Shard

log = logging.getLogger(__name__)

OOD_FILE = "out_of_distribution.csv"  # scans that fail the out-of-distribution check
Encode = Callable[[np.ndarray, Tensor], Posterior]  # from rows and their volumes as stored in the cache


def encode_cohort(
    run: Run,
    cohort: Cohort,
    folder: Path,
    table: Path,
    accelerator: Accelerator,
    batch_size: int,
    shard: Shard | None = None,
) -> None:
    """Encode `cohort` with the autoencoder of `run` into `folder`. latents.json is written last.

    All processes encode and end within about one batch of each other. The main process then writes the file of all
    latents, while the others return. Several jobs can share the work: the last one writes the file of all latents.

    Args:
        run: the run of stage 1.
        folder: where the latents are written; what is there already is kept.
        table: the table of the cohort, from which the name of the table of latents is derived.
        batch_size: scans per batch.
        shard: the part of the batches that this job encodes; None: all, and `folder` must then be locked.

    Raises:
        UserError: a latent is not finite.
    """
    encode = _encoder(run, cohort, accelerator)
    weights, scans = run.sha256("autoencoder"), cohort.digest_scans(accelerator.mixed_precision)
    encoded = EncodedLatents.find(folder, weights, cohort.table, scans)
    # Batches are cut from the whole table, because results are rounded differently in batches of other scans.
    rows = np.arange(len(cohort))
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    _encode_missing(encode, cohort, encoded, batches if shard is None else shard.take(batches), accelerator)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return
    with nullcontext() if shard is None else wait_for_lock(folder / LOCK):
        if shard is not None:  # another job may have merged all shards meanwhile
            encoded = EncodedLatents.find(folder, weights, cohort.table, scans)
        if shard is None or _are_complete(encoded, batches, shard):
            latents = encoded.merge(batches, lambda rows: encode(rows, cohort.volumes.read_stored(rows)))
            _finish(run, cohort, folder, table, latents, weights, accelerator.mixed_precision)
            encoded.remove_shards()


def _are_complete(encoded: EncodedLatents, batches: list[np.ndarray], shard: Shard) -> bool:
    missing = sum(not encoded.has(rows) for rows in batches)
    if missing:
        log.info("shard %s is finished; %d of %d batches are still missing", shard, missing, len(batches))
    return not missing


def _encoder(run: Run, cohort: Cohort, accelerator: Accelerator) -> Encode:
    device = accelerator.device
    on_gpu = computes_channels_last(device, DTYPES[accelerator.mixed_precision])
    autoencoder = place_module(run.module("autoencoder", run.config.model.autoencoder), device, on_gpu)
    channels_last = on_gpu or device.type == "cpu"  # the memory format of training (docs/bench.md)

    def encode(rows: np.ndarray, x: Tensor) -> Posterior:
        with torch.inference_mode(), accelerator.autocast():
            x = to_memory_format(cohort.volumes.decode(x.to(device, non_blocking=True)), channels_last)
            mean, std = autoencoder.encode(x)
            mean, std = torch.stack((mean.float(), std.float())).cpu().numpy()  # in one transfer
        finite = np.isfinite(mean) & np.isfinite(std)
        if not finite.all():
            bad = rows[~finite.reshape(len(rows), -1).all(axis=1)]
            names = ", ".join(scan_names(cohort.table, bad))
            raise UserError(f"{run.path} gives latents that are not finite for {names}: train it again, or in float32")
        return mean, std

    return encode


def _encode_missing(
    encode: Encode, cohort: Cohort, encoded: EncodedLatents, batches: list[np.ndarray], accelerator: Accelerator
) -> None:
    """Encode until all batches exist, whichever process has encoded them."""
    done = sum(encoded.has(rows) for rows in batches)
    if done:
        log.info("%d of %d batches of scans are encoded already", done, len(batches))
    order = work_order(len(batches), accelerator.process_index, accelerator.num_processes)
    show = accelerator.is_main_process
    with (
        ThreadPoolExecutor(2) as threads,
        tqdm(total=len(batches), initial=done, desc="encoding", unit="batch", disable=not show) as bar,
    ):
        writing: Future[None] | None = None
        missing = (batches[number] for number in order if not encoded.has(batches[number]))
        for rows, x in _read_ahead(threads, cohort, missing):
            mean, std = encode(rows, x)
            if writing is not None:
                writing.result()
            writing = threads.submit(encoded.write, rows, mean, std)
            bar.update()
        if writing is not None:
            writing.result()


def _read_ahead(
    threads: ThreadPoolExecutor, cohort: Cohort, batches: Iterable[np.ndarray]
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Batches and their volumes as stored, (B, 1, X, Y, Z). The next batch is read while the current one is used."""
    waiting: tuple[np.ndarray, Future[Tensor]] | None = None
    for rows in batches:
        following = (rows, threads.submit(cohort.volumes.read_stored, rows))
        if waiting is not None:
            yield waiting[0], waiting[1].result()
        waiting = following
    if waiting is not None:
        yield waiting[0], waiting[1].result()


def _finish(
    run: Run, cohort: Cohort, folder: Path, table: Path, latents: LatentFile, weights: str, precision: str
) -> None:
    name = latent_table_name(table)
    write_table(cohort.table.assign(latent_path=LATENT_FILE), folder / name)
    cohort.write_rejected(folder / REJECTED_FILE)
    shape = list(latents.mean.shape[1:])
    scale = _stored_scale(folder, cohort, weights) or channel_scale(latents.mean, latents.std, cohort.rows("train"))
    metadata: dict[str, Any] = {
        "table": name,
        "scans": len(latents),
        "rejected": len(cohort.rejected),
        "shape": shape,
        "scale": scale,
        "split_hash": cohort.split_hash,
        "autoencoder_sha256": weights,
        "autoencoder": run.metadata["step"],
        "transform": cohort.transform.key(),
        "precision": precision,
        **_describe_training_scans(cohort),
    }
    _check_distribution(cohort, metadata["likeness"], folder / OOD_FILE)
    write_metadata(folder, metadata)
    log.info("%d latents of shape %s in %s; scale %s", len(latents), shape, folder, [round(s, 4) for s in scale])


def _stored_scale(folder: Path, cohort: Cohort, weights: str) -> list[float] | None:
    """The scale of the latents that these extend by new subjects: a U-Net may have been trained with it.

    It also stays when latents that have been extended are made again, as the last ones of several jobs do.
    """
    path = folder / METADATA_FILE
    if not path.exists():
        return None
    stored = read_json(path)
    earlier = cohort.split.earlier
    extended = earlier and stored.get("split_hash") in (*earlier, cohort.split_hash)
    return stored["scale"] if extended and stored.get("autoencoder_sha256") == weights else None


def _describe_training_scans(cohort: Cohort) -> dict[str, Any]:
    """What inference needs to know about the training scans.

    "likeness": values for the out-of-distribution check (ldae.scans.ood_check); "preprocess": parameters of their
    preprocessing (ldae.scans.raw_scan); "affine": that of model space. None for what is unknown or differs between
    scans.
    """
    rows = _measured_rows(cohort)
    paths = [cohort.table["path"].iloc[row] for row in rows]
    ood_check = OodCheck.fit(cohort.volumes[row] for row in rows)
    return {
        "likeness": None if ood_check is None else ood_check.to_dict(),
        "preprocess": read_recorded_parameters(paths),
        "affine": common_affine(paths, cohort.transform),
    }


def _measured_rows(cohort: Cohort) -> np.ndarray:
    """The training scans that the out-of-distribution check is measured on: at most MAX_SCANS, over the whole table."""
    rows = cohort.rows("train")
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_SCANS)).astype(int)]


def _check_distribution(cohort: Cohort, check: dict[str, Any] | None, file: Path) -> None:
    """Log how many scans fail the out-of-distribution check and list them in `file`, which is removed if none does.

    The training scans that its limits were measured on meet them by definition.
    """
    file.unlink(missing_ok=True)
    if check is None:
        log.info("too few training scans for an out-of-distribution check")
        return
    others = np.setdiff1d(np.arange(len(cohort)), _measured_rows(cohort))
    rejected = find_rejected(OodCheck.from_dict(check), cohort.volumes.batch, others)
    log.info("%s", describe_rejected(rejected, scan_names(cohort.table, range(len(cohort))), len(cohort)))
    if rejected:
        scans = cohort.table.iloc[list(rejected)][["subject", "session", "split", "path"]]
        write_table(scans.assign(reason=list(rejected.values())), file)


def common_affine(paths: list[str], transform: Transform) -> list[list[float]] | None:
    """The affine of model space, (4, 4) from voxels to mm, if all scans of `paths` are on the same grid; else None."""
    grids = ((image.shape, image.affine) for image in map(nib.load, paths))
    shape, affine = next(grids)
    if not all(other == shape and np.allclose(matrix, affine, atol=1e-3) for other, matrix in grids):
        return None
    return transform.to_model_space(paths[0]).affine.tolist()
