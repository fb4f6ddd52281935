"""Work in processes of few threads each, that survives the death of a process.

A native library that crashes, or the kernel that ends a process for lack of memory, takes the whole pool along. The
scans that were under way are then tried one by one, each in a process of its own: the one that dies again is to blame.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

log = logging.getLogger(__name__)

THREADS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)  # fmt: skip
DIED = object()  # in place of the result of a call whose process died


def run(
    work: Callable[..., Any], calls: Sequence[tuple[Any, ...]], workers: int, threads: int
) -> Iterator[tuple[int, Any]]:
    """(index, work(*calls[index])) in order of completion; DIED where the process did not survive the call.

    Exceptions of `work` are raised here. However the iteration ends, no process stays behind.
    """
    left = dict(enumerate(calls))
    while left:
        yield from _pooled(work, left, workers, threads)
        # What is left was in a pool that broke. Calls start in order, a pool holds a few more than it works on.
        for index in sorted(left)[: 2 * workers + 2]:
            alone = {index: left[index]}
            yield from _pooled(work, alone, 1, threads)
            if alone:
                yield index, DIED
            del left[index]


def _pooled(
    work: Callable[..., Any], left: dict[int, tuple[Any, ...]], workers: int, threads: int
) -> Iterator[tuple[int, Any]]:
    """Results as they come, taken out of `left`; ends early when the pool breaks."""
    from concurrent.futures import as_completed
    from concurrent.futures.process import BrokenProcessPool

    from joblib.externals.loky import ProcessPoolExecutor

    limits = dict.fromkeys(THREADS, str(threads))
    pool = ProcessPoolExecutor(min(workers, len(left)), env=limits, initializer=_limit, initargs=(threads,))
    try:
        futures = {pool.submit(work, *call): index for index, call in left.items()}
        for future in as_completed(futures):
            try:
                result = future.result()
            except BrokenProcessPool:
                log.warning("a worker process died; the scans under way are tried again one by one")
                return
            del left[futures[future]]
            yield futures[future], result
    finally:
        pool.shutdown(wait=True, kill_workers=True)


def _limit(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
