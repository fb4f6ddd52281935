"""A synthetic cohort on disk: NIfTI scans, label maps and the table that lists them."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np

from ldae.data.phantom import SHAPE, SPACING
from ldae.data.phantom.subjects import draw_subject, table_row
from ldae.utils.errors import UserError
from ldae.utils.files import read_json, replacing, write_json
from ldae.utils.process_pool import DIED, DIED_REASON, available_cores, run_in_processes

log = logging.getLogger(__name__)

VERSION = 4  # of the generator; a cohort of another version is refused
COLUMNS = (
    "subject", "session", "path", "diagnosis", "age", "sex", "scanner", "ventricle_mm3", "hippocampus_mm3", "brain_mm3",
    "head_mm3", "severity", "labels_path", "phantom_seed",
)  # fmt: skip
POLL_SECONDS, LOG_SECONDS = 0.5, 60.0  # while waiting for another process: between two checks, and two log lines
SMALLEST_FIELD = (150.0, 185.0, 150.0)  # mm, contains an average head


def make_cohort(
    out: Path | str,
    subjects: int,
    seed: int,
    spacing: float = SPACING,
    shape: tuple[int, int, int] = SHAPE,
    workers: int | None = None,
    progress: bool = True,
    months: Sequence[int] | None = None,
) -> Path:
    """Render a cohort into the folder `out` and return the path of its table, `out/scans.csv`.

    A complete cohort is reused, and an interrupted one is continued. The result does not depend on `workers`.

    Args:
        subjects: number of subjects.
        seed: of the cohort.
        spacing: voxel size in mm.
        shape: number of voxels along each axis.
        workers: number of processes; None: one for each core.
        months: of every subject's sessions; None: those that are drawn for the subject.

    Raises:
        UserError: `out` contains another cohort, the months do not increase from 0 or later, or the sizes are
            impossible.
    """
    out, shape = Path(out), tuple(int(n) for n in shape)
    _check_sizes(subjects, spacing, shape)
    visits = None if months is None else _check_months(months)
    size = {"subjects": int(subjects), "spacing": float(spacing), "shape": list(shape)}
    size |= {} if visits is None else {"months": list(visits)}
    parameters = {"version": VERSION, "seed": int(seed), **size}
    table = out / "scans.csv"
    if _claim(out, parameters) and table.exists():
        return table
    todo = [subject for subject in range(1, subjects + 1) if not _sidecar(out, subject).exists()]
    _render_all(todo, out, seed, float(spacing), shape, workers, progress, visits)
    _write_table(table, [scan for subject in range(1, subjects + 1) for scan in read_json(_sidecar(out, subject))])
    return table


def cohort_folder(
    data: Path | str, subjects: int, seed: int, spacing: float, shape: Sequence[int], months: Sequence[int] = ()
) -> Path:
    """The folder below `data` that conf/data/phantom.yaml derives from the parameters of a synthetic cohort."""
    visits = f"_months{'-'.join(map(str, months))}" if len(months) else ""
    return Path(data) / f"phantom_n{subjects}_seed{seed}_{spacing}mm_{'x'.join(map(str, shape))}{visits}"


def wait_for_cohort(table: Path, patience: float = 10.0) -> None:
    """Wait until another process that runs `make_cohort` has written `table`.

    Args:
        patience: minutes without a new subject after which the other process is considered dead.

    Raises:
        UserError: the other process is considered dead.
    """
    count, last_change, last_log = -1, time.monotonic(), time.monotonic()
    while not table.exists():
        time.sleep(POLL_SECONDS)
        now, done = time.monotonic(), sum(1 for _ in table.parent.glob("sub-*/scans.json"))
        if done != count:
            count, last_change = done, now
        if now - last_change > 60 * patience:
            raise UserError(f"no phantom was added to {table.parent} for {patience:g} minutes: run again")
        if now - last_log > LOG_SECONDS:
            last_log = now
            log.info("the main process makes phantoms in %s: %d so far", table.parent, done)


def _check_sizes(subjects: int, spacing: float, shape: tuple[int, ...]) -> None:
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


def _check_months(months: Sequence[int]) -> tuple[int, ...]:
    visits = tuple(int(month) for month in months)
    if not visits or visits[0] < 0 or any(a >= b for a, b in pairwise(visits)):
        raise UserError(f"phantom months {list(months)}: must increase, from 0 or later")
    return visits


def _claim(out: Path, parameters: dict) -> bool:
    """Write which cohort `out` is for; whether that was already written. Another cohort is refused."""
    path = out / "phantom.json"
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} contains other files: a synthetic cohort needs a folder of its own")
        write_json(path, parameters)
        return False
    found = read_json(path)
    if found != parameters:
        wrong = ", ".join(f"{k} {found.get(k)} not {v}" for k, v in parameters.items() if found.get(k) != v)
        raise UserError(f"{out} holds another phantom cohort ({wrong}): choose another folder or remove this one")
    return True


def _sidecar(out: Path, subject: int) -> Path:
    """File with the rows of a subject; it is written last and marks the subject as complete."""
    return out / f"sub-{subject:04d}" / "scans.json"


def _render_all(
    todo: list[int],
    out: Path,
    seed: int,
    spacing: float,
    shape: tuple[int, ...],
    workers: int | None,
    progress: bool,
    months: tuple[int, ...] | None,
) -> None:
    workers = min(workers or available_cores(), -(-len(todo) // 4))  # starting a process takes seconds
    items = [(out, seed, subject, spacing, shape, months) for subject in todo]
    results = run_in_processes(
        _render_subject, items, workers if workers > 1 else 0, label="phantoms", unit="subject", progress=progress
    )
    died = [todo[index] for index, result in results if result is DIED]
    if died:
        raise UserError(f"phantom subject {died[0]} is missing: {DIED_REASON}; run again with fewer workers")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute with one thread, so that sums have the same bits on any number of cores."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


def _render_subject(
    out: Path, seed: int, subject: int, spacing: float, shape: tuple[int, ...], months: tuple[int, ...] | None
) -> None:
    """Write all sessions of one subject, and its sidecar last."""
    from ldae.data.phantom.rendering import render

    rows = []
    with _one_thread():
        for factors in draw_subject(seed, subject, months):
            scan = render(factors, spacing=spacing, shape=shape)
            row = table_row(factors, scan.volumes)
            name = f"{row['subject']}/{row['session']}"
            stem = f"{name}/{name.replace('/', '_')}"
            row |= {"path": f"{stem}_T1w.nii.gz", "labels_path": f"{stem}_dseg.nii.gz"}
            _save(out / row["path"], np.rint(scan.image).astype(np.int16), scan.affine)
            _save(out / row["labels_path"], scan.labels, scan.affine)
            rows.append(row)
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
