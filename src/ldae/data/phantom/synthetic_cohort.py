"""A cohort of phantoms on disk: NIfTI scans, label maps and the table that lists them."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ldae.data.phantom import SHAPE, SPACING
from ldae.data.phantom.subjects import draw_subject, table_row
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, replacing, write_json
from ldae.utils.process_pool import DIED, DIED_REASON, available_cores, run_in_processes

log = logging.getLogger(__name__)

VERSION = 4  # of the generator: a cohort made by another one is refused
COLUMNS = (
    "subject", "session", "path", "diagnosis", "age", "sex", "scanner", "ventricle_mm3", "hippocampus_mm3", "brain_mm3",
    "head_mm3", "severity", "labels_path", "phantom_seed",
)  # fmt: skip
POLL, SAY_EVERY = 0.5, 60.0  # seconds between two looks at what another process does, and between two lines about it
SMALLEST_FIELD = (150.0, 185.0, 150.0)  # mm that an average head needs


def make_cohort(
    out: Path | str,
    subjects: int,
    seed: int,
    spacing: float = SPACING,
    shape: tuple[int, int, int] = SHAPE,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Render `subjects` phantoms into the folder `out` and return the path of their table, `out/scans.csv`.

    `spacing` in mm, `shape` in voxels. A complete cohort is reused, an interrupted one continued. The result does not
    depend on `workers` (default: all cores). Raises UserError if `out` holds another cohort, or for impossible sizes.
    """
    out, shape = Path(out), tuple(int(n) for n in shape)
    _check(subjects, spacing, shape)
    size = {"subjects": int(subjects), "spacing": float(spacing), "shape": list(shape)}
    parameters = {"version": VERSION, "seed": int(seed), **size}
    table = out / "scans.csv"
    if _claim(out, parameters) and table.exists():
        return table
    todo = [subject for subject in range(1, subjects + 1) if not _sidecar(out, subject).exists()]
    _render_all(todo, out, seed, float(spacing), shape, workers, progress)
    _write_table(table, [scan for subject in range(1, subjects + 1) for scan in read_json(_sidecar(out, subject))])
    return table


def wait_for_cohort(table: Path, patience: float = 10.0) -> None:
    """Return once another process has written `table`, at whose folder it works with `make_cohort`.

    Args:
        patience: minutes without a new subject after which it is taken for dead.

    Raises:
        UserError: it is.
    """
    seen, changed, said = -1, time.monotonic(), time.monotonic()
    while not table.exists():
        time.sleep(POLL)
        now, done = time.monotonic(), sum(1 for _ in table.parent.glob("sub-*/scans.json"))
        if done != seen:
            seen, changed = done, now
        if now - changed > 60 * patience:
            raise UserError(f"no phantom was added to {table.parent} for {patience:g} minutes: run again")
        if now - said > SAY_EVERY:
            said = now
            log.info("the main process makes phantoms in %s: %d so far", table.parent, done)


def _check(subjects: int, spacing: float, shape: tuple[int, ...]) -> None:
    if subjects < 1:
        raise UserError(f"phantom subjects = {subjects}: must be at least 1")
    if not 0.5 <= spacing <= 20:
        raise UserError(f"phantom spacing = {spacing}: must be between 0.5 and 20 mm")
    field = tuple(spacing * n for n in shape)
    if len(shape) != 3 or any(have < need for have, need in zip(field, SMALLEST_FIELD, strict=True)):
        raise UserError(
            f"phantom shape {list(shape)} at {spacing} mm: the field of view must be at least {SMALLEST_FIELD} mm, "
            "enlarge shape or spacing"
        )


def _claim(out: Path, parameters: dict) -> bool:
    """Mark `out` as the place of this cohort; True if it already was."""
    path = out / "phantom.json"
    if not path.exists():
        write_json(path, parameters)
        return False
    found = read_json(path)
    if found != parameters:
        wrong = ", ".join(f"{k} {found.get(k)} not {v}" for k, v in parameters.items() if found.get(k) != v)
        raise UserError(f"{out} holds another phantom cohort ({wrong}): choose another folder or remove this one")
    return True


def _sidecar(out: Path, subject: int) -> Path:
    """Written when a subject is complete: its rows of the table."""
    return out / f"sub-{subject:04d}" / "scans.json"


def _render_all(
    todo: list[int], out: Path, seed: int, spacing: float, shape: tuple[int, ...], workers: int | None, progress: bool
) -> None:
    workers = min(workers or available_cores(), -(-len(todo) // 4))  # starting a process takes seconds
    items = [(out, seed, subject, spacing, shape) for subject in todo]
    results = run_in_processes(
        _render_subject, items, workers if workers > 1 else 0, label="phantoms", unit="subject", progress=progress
    )
    died = [todo[index] for index, result in results if result is DIED]
    if died:
        raise UserError(f"phantom subject {died[0]} is missing: {DIED_REASON}; run again with fewer workers")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are the same bits whatever the number of cores, and processes do not fight for them."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def _render_subject(out: Path, seed: int, subject: int, spacing: float, shape: tuple[int, ...]) -> None:
    """All sessions of one subject, and last its sidecar."""
    from ldae.data.phantom.rendering import render

    rows = []
    with _one_thread():
        for factors in draw_subject(seed, subject):
            scan = render(factors, spacing=spacing, shape=shape)
            described = table_row(factors, scan.volumes)
            name = f"{described['subject']}/{described['session']}"
            stem = f"{name}/{name.replace('/', '_')}"
            described |= {"path": f"{stem}_T1w.nii.gz", "labels_path": f"{stem}_dseg.nii.gz"}
            _save(out / described["path"], np.rint(scan.image).astype(np.int16), scan.affine)
            _save(out / described["labels_path"], scan.labels, scan.affine)
            rows.append(described)
    write_json(_sidecar(out, subject), rows)


def _save(path: Path, volume: np.ndarray, affine: np.ndarray) -> None:
    import nibabel

    image = nibabel.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    with replacing(path) as temporary:
        nibabel.save(image, temporary)


def _write_table(path: Path, rows: list[dict]) -> None:
    import pandas as pd

    frame = pd.DataFrame(rows, columns=COLUMNS)
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False)
